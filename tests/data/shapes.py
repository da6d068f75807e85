"""What a data config says of its batches, against the batches."""

from moe_jax.data.interface import DataConfig, Pipeline


def assert_batch_shapes(config: DataConfig, pipeline: Pipeline) -> None:
    """Names, shapes and dtypes are exactly those of a whole batch."""
    batch = pipeline.rows(0, 0, config.batch_size)
    found = {name: (array.shape, array.dtype) for name, array in batch.items()}
    assert found == {
        name: (array.shape, array.dtype) for name, array in config.batch_shapes.items()
    }
