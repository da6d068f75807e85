"""A block is a list of sub-layers and a form that adds them up, which a config may swap."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import moe_jax as moe
from moe_jax import configuration
from moe_jax.layers.mode import Mode
from moe_jax.models.abstract_model import AbstractModel
from moe_jax.models.blocks import Block, BlockForm, Parallel, Pass, PreNorm, SparseDense
from moe_jax.models.stack import StackConfig
from tests.tiny import tiny_config

B, L, D, E = 2, 8, 16, 4
X = jax.random.normal(jax.random.key(1), (B, L, D))
INFO = moe.TokenInfo.of(jnp.zeros((B, L), jnp.int32))
PASS = Pass(INFO, Mode.EVALUATE)


def config_of(**fields):
    return StackConfig(width=D, num_heads=2, head_width=8, mlp_width=32, num_experts=E, **fields)


def block_of(num_experts, **fields):
    config = config_of(**fields)
    return Block(config, config.moe, num_experts, True, False, jax.random.key(0))


@dataclasses.dataclass
class Sandwich(BlockForm):
    """A form of one's own: the sub-layers' outputs count half."""

    share: float = 0.5

    def __call__(self, x, sublayers):
        outs = []
        for sublayer in sublayers:
            outs.append(sublayer.layer(sublayer.norm(x)))
            x = x + self.share * outs[-1].y
        return x, outs


@pytest.mark.parametrize("num_experts", [0, E])
def test_pre_norm_adds_one_sublayer_after_the_other(num_experts):
    block = block_of(num_experts)
    got, _, report = jax.jit(lambda x: block(x, PASS, None))(X)
    x = X + block.attention(block.attention_norm(X), PASS.attention_inputs, None)[0]
    y = block.mlp(block.mlp_norm(x))[0] if num_experts else block.mlp(block.mlp_norm(x), None)
    np.testing.assert_allclose(got, x + y, rtol=1e-5, atol=1e-6)
    assert (report is not None) == bool(num_experts)


def test_parallel_sublayers_read_one_norm():
    block = block_of(E, block=Parallel())
    got, _, _ = jax.jit(lambda x: block(x, PASS, None))(X)
    normed = block.attention_norm(X)
    attended = block.attention(normed, PASS.attention_inputs, None)[0]
    np.testing.assert_allclose(got, X + attended + block.mlp(normed)[0], rtol=1e-5, atol=1e-6)
    assert block.mlp_norm is None  # Nothing is drawn that nothing reads.


@pytest.mark.parametrize("place", [SparseDense.BEFORE, SparseDense.AFTER])
def test_a_dense_sublayer_stands_where_it_is_asked_to(place):
    block = block_of(E, sparse_dense=place)
    got, _, _ = jax.jit(lambda x: block(x, PASS, None))(X)
    x = X + block.attention(block.attention_norm(X), PASS.attention_inputs, None)[0]

    def dense(x):
        return x + block.dense["feed_forward"](block.dense["norm"](x), None)

    def sparse(x):
        return x + block.mlp(block.mlp_norm(x))[0]

    want = sparse(dense(x)) if place == SparseDense.BEFORE else dense(sparse(x))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", [Parallel(), Sandwich(0.25)], ids=["parallel", "own"])
def test_a_model_with_another_block_trains_and_is_rebuilt(form, data_dir, tmp_path):
    config = tiny_config(data_dir)
    config.steps, config.model.block = 2, form
    again = configuration.decode(json.loads(json.dumps(configuration.encode(config))))
    assert again == config and type(again.model.block) is type(form)
    records = moe.train(config, tmp_path / "run")
    assert np.isfinite(records[-1]["train/loss"])
    evaluated = moe.evaluate(tmp_path / "run")["eval/loss"]
    assert evaluated == pytest.approx(records[-1]["eval/loss"], rel=1e-6)


def test_cached_decoding_of_parallel_blocks_equals_the_whole_pass():
    config = moe.DecoderLMConfig(
        num_layers=2, width=D, num_heads=2, head_width=8, mlp_width=32, num_experts=E,
        vocab_size=32, max_length=L, block=Parallel(),
    )  # fmt: skip
    model = config.build(jax.random.key(0))
    graph, values = nnx.split(model)
    tokens = jax.random.randint(jax.random.key(2), (B, L), 0, 32)

    @jax.jit
    def step(values, tokens, cache):
        logits, _, cache = nnx.merge(graph, values)(tokens, None, Mode.DECODE, cache=cache)
        return logits, cache

    whole, _ = step(values, tokens, None)
    cache, parts = model.empty_cache(B, L), []
    for t in range(L):
        logits, cache = step(values, tokens[:, t : t + 1], cache)
        parts.append(logits)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, rtol=1e-4, atol=1e-5)


def test_forms_of_blocks_have_the_parameters_they_use():
    def names(form):
        config = tiny_config("").model
        config.block = form
        shapes = AbstractModel.of(config).shapes
        return {jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(shapes)}

    missing = names(PreNorm()) - names(Parallel())
    assert missing and all("mlp_norm" in name for name in missing)
    assert names(Parallel()) < names(PreNorm())
