"""A config for the tests of bad input, whose messages quote its numbers."""

from moe_jax.data.pipelines import TextData
from moe_jax.layers.moe import MoEConfig
from moe_jax.models.decoder_lm import DecoderLMConfig
from moe_jax.parallel.mesh import MeshConfig
from moe_jax.training.experiment import Experiment


def get_config() -> Experiment:
    """64 x 128 tokens, 4 blocks, 8 experts on data=2 x expert=4."""
    return Experiment(
        model=DecoderLMConfig(max_length=128, moe=MoEConfig(group_size=512)),
        data=TextData(sequence_length=128, batch_size=64),
        mesh=MeshConfig(data=2, expert=4),
    )
