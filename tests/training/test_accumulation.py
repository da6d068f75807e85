import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.analysis.hlo import Program
from moe_jax.errors import UserError
from moe_jax.layers.embedding import TokenEmbedding
from moe_jax.layers.moe import MoEConfig, TokenInfo
from moe_jax.models.abstract_model import AbstractModel
from moe_jax.models.blocks import Pass
from moe_jax.models.decoder_lm import DecoderLMConfig
from moe_jax.models.stack import Stack, StackConfig
from moe_jax.parallel.mesh import TOKEN_AXES, MeshConfig, make_mesh
from moe_jax.routing.deepseek import DeepSeekV3
from moe_jax.tasks.language_modeling import LanguageModeling
from moe_jax.training.microbatches import split_rows
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


def biased():
    return DeepSeekV3(k=1, groups=1, groups_per_token=1, bias_rate=1e-3)


def batch_of(rows):
    tokens = jax.random.randint(jax.random.key(1), (rows, LENGTH + 1), 0, 32)
    return {"tokens": tokens, "domain": jnp.zeros(rows, jnp.int32)}


class Steps:
    """A model, its state and its step, compiled for one number of microbatches."""

    def __init__(self, config, mesh_config, rows, microbatches):
        self.mesh = make_mesh(mesh_config)
        abstract_model = AbstractModel.of(config)
        optimizer = SGD(learning_rate=0.5).build(10, abstract_model.axes)
        shardings = state_shardings(abstract_model, optimizer, self.mesh, fsdp_min_size=1)
        step = train_step(abstract_model, LanguageModeling(), optimizer, False, microbatches)
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
    config = model_config(2, MoEConfig(router=biased(), group_size=LENGTH))
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


@dataclasses.dataclass
class TwoTowersConfig:
    """A model that the library does not know."""

    tower: StackConfig
    model: type[nnx.Module]

    @property
    def moe_layers(self):
        return ["odd/0", "rest/0"]

    def build(self, key):
        return self.model(self, key)


class TwoTowers(nnx.Module):
    """One tower reads what is odd in token ids, one the rest.

    Attributes sort as a_tower, z_tower; reports come z_tower's first; the layers' names begin with
    neither.
    """

    def __init__(self, config, key):
        self.config = nnx.static(config)
        config = config.tower
        keys = jax.random.split(key, 3)
        self.tokens = TokenEmbedding(config.vocab_size, config.width, 1.0, keys[0], tied=True)
        self.z_tower, self.a_tower = (Stack(config, k, causal=True) for k in keys[1:])

    def __call__(self, tokens, mask, mode, key):
        info = TokenInfo.of(tokens)
        sum_of_towers, reports = 0.0, []
        for tower, ids in ((self.z_tower, tokens % 2), (self.a_tower, tokens // 2)):
            x, of_tower, _ = tower(self.tokens(ids, jnp.float32), Pass(info, mode, key))
            sum_of_towers += x
            reports += of_tower
        return self.tokens.logits(sum_of_towers), reports, None


class ForgetsATower(TwoTowers):
    def __call__(self, tokens, mask, mode, key):
        logits, reports, cache = super().__call__(tokens, mask, mode, key)
        return logits, reports[:1], cache


class ReportsOneTwice(TwoTowers):
    def __call__(self, tokens, mask, mode, key):
        logits, reports, cache = super().__call__(tokens, mask, mode, key)
        return logits, reports[:1] * 2, cache


class Counts(TwoTowers):
    def __init__(self, config, key):
        super().__init__(config, key)
        self.steps = nnx.BatchStat(jnp.zeros(1), axes=("norm",))


def two_towers(model=TwoTowers):
    moe = MoEConfig(router=biased(), group_size=LENGTH)
    return TwoTowersConfig(dataclasses.replace(model_config(1, moe), num_layers=1), model)


def test_each_router_follows_the_load_of_its_own_module():
    """Whatever attributes are called and in whatever order they report."""
    whole, parts = (Steps(two_towers(), MeshConfig(), 16, n) for n in (1, 4))
    (state, metrics), (expected, expected_metrics) = parts.two(), whole.two()
    assert_equal_trees(state.variables, expected.variables, 0.0)
    biases = jax.tree.leaves(state.variables)
    assert len(biases) == 2
    assert np.abs(biases[0] - biases[1]).max() > 1e-3
    assert_equal_trees(metrics["router"], expected_metrics["router"], 1e-5)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (ForgetsATower, "no report of its MoE layer 'a_tower/stages/0/blocks/0/mlp'"),
        (ReportsOneTwice, "2 reports of 'z_tower/stages/0/blocks/0/mlp'"),
        (Counts, "the model keeps steps, which is not a router's state"),
    ],
)
def test_what_cannot_be_paired_is_an_error(model, message):
    with pytest.raises(UserError, match=message):
        Steps(two_towers(model), MeshConfig(), 16, 4)
