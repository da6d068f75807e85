import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.analysis.hlo import Program
from moe_jax.layers.moe import MoEConfig
from moe_jax.models.decoder_lm import DecoderLMConfig
from moe_jax.models.definition import ModelDefinition
from moe_jax.models.encoder_decoder import EncoderDecoderConfig
from moe_jax.models.stack import StackConfig
from moe_jax.parallel.mesh import TOKEN_AXES, MeshConfig, make_mesh
from moe_jax.routing.deepseek import DeepSeekV3
from moe_jax.routing.token_choice import TopK
from moe_jax.tasks.language_modeling import LanguageModeling
from moe_jax.training.microbatches import moe_modules, split_rows
from moe_jax.training.optimizers import SGD
from moe_jax.training.state import initial_state, state_shardings
from moe_jax.training.step import noise_key, train_step

LENGTH = 8


def model_config(moe_every, moe=None):
    return DecoderLMConfig(
        num_layers=2,
        width=8,
        num_heads=2,
        head_width=4,
        mlp_width=16,
        vocab_size=32,
        max_length=LENGTH,
        num_experts=4,
        moe_every=moe_every,
        moe=moe or MoEConfig(),
    )


def batch_of(rows):
    tokens = jax.random.randint(jax.random.key(1), (rows, LENGTH + 1), 0, 32)
    return {"tokens": tokens, "domain": jnp.zeros(rows, jnp.int32)}


class Steps:
    """A model, its state and its step, compiled for one number of microbatches."""

    def __init__(self, config, mesh_config, rows, microbatches):
        self.mesh = make_mesh(mesh_config)
        definition = ModelDefinition.of(config)
        optimizer = SGD(learning_rate=0.5).build(10, definition.axes)
        shardings = state_shardings(definition, optimizer, self.mesh, fsdp_min_size=1)
        step = train_step(definition, LanguageModeling(), optimizer, False, microbatches)
        with jax.set_mesh(self.mesh):
            self.state = initial_state(config, optimizer, 0, shardings)
            placement = NamedSharding(self.mesh, PartitionSpec(TOKEN_AXES))
            self.batch = jax.device_put(batch_of(rows), placement)
            jitted = jax.jit(step, out_shardings=(shardings, None))
            self.arguments = (self.batch, noise_key(0))
            self.compiled = jitted.lower(self.state, *self.arguments).compile()

    def two(self):
        """(state, metrics of the second step)."""
        with jax.set_mesh(self.mesh):
            state, _ = self.compiled(self.state, *self.arguments)
            return jax.device_get(self.compiled(state, *self.arguments))


def assert_equal_trees(tree, expected, tolerance):
    for (path, leaf), other in zip(
        jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(leaf, other, atol=tolerance, err_msg=jax.tree_util.keystr(path))


def test_four_parts_of_a_dense_models_batch_are_the_batch_in_less_memory():
    whole, parts = (Steps(model_config(0), MeshConfig(), 64, n) for n in (1, 4))
    (state, metrics), (expected, expected_metrics) = parts.two(), whole.two()
    assert_equal_trees(state.parameters, expected.parameters, 1e-6)
    assert metrics["loss"] == pytest.approx(expected_metrics["loss"], abs=1e-6)
    memory = [steps.compiled.memory_analysis().temp_size_in_bytes for steps in (whole, parts)]
    assert memory[1] < 0.5 * memory[0]


def test_four_parts_of_a_moes_batch_are_the_batch_on_a_mesh():
    """Groups are rows, and the expert bias moves once, by the load of all parts."""
    router = DeepSeekV3(k=1, groups=1, groups_per_token=1, bias_rate=1e-3)
    config = model_config(2, MoEConfig(router=router, group_size=LENGTH))
    mesh = MeshConfig(data=2, expert=4)
    whole, parts = (Steps(config, mesh, 32, n) for n in (1, 4))
    (state, metrics), (expected, expected_metrics) = parts.two(), whole.two()
    assert_equal_trees(state.parameters, expected.parameters, 1e-5)
    assert_equal_trees(state.variables, expected.variables, 1e-7)
    (bias,) = jax.tree.leaves(state.variables)
    assert np.abs(bias).max() == pytest.approx(2e-3, rel=1e-6)
    report, expected_report = metrics["router"][0], expected_metrics["router"][0]
    assert_equal_trees(report.statistics, expected_report.statistics, 1e-5)
    assert_equal_trees(report.losses, expected_report.losses, 1e-5)


def test_rows_stay_where_they_are():
    mesh = make_mesh(MeshConfig(data=2, expert=4))
    with jax.set_mesh(mesh):
        placement = NamedSharding(mesh, PartitionSpec(TOKEN_AXES))
        rows = jax.device_put({"row": jnp.arange(32), "domain": jnp.zeros((32, 3))}, placement)
        compiled = jax.jit(lambda batch: split_rows(batch, 4)).lower(rows).compile()
        parts = compiled(rows)
    np.testing.assert_array_equal(parts["row"][1], np.arange(1, 32, 4))
    assert parts["row"].sharding.spec == PartitionSpec(None, TOKEN_AXES)
    assert not Program(compiled.as_text()).collectives()


def test_modules_come_in_the_order_of_the_reports():
    """An encoder's before a decoder's, though attributes are sorted by name."""

    def stack(num_layers, k):
        return StackConfig(
            num_layers=num_layers, width=8, num_experts=4, moe=MoEConfig(router=TopK(k=k))
        )

    config = EncoderDecoderConfig(encoder=stack(4, 1), decoder=stack(2, 2))
    assert config.moe_layers == ["encoder/1", "encoder/3", "decoder/1"]
    model = nnx.eval_shape(lambda: config.build(jax.random.key(0)))
    assert [module.config.router.k for module in moe_modules(model)] == [1, 2]
