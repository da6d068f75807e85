"""The layer as a layer: called without jit, without a config of a run, with or without a mesh."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import moe_jax as moe
from moe_jax.routing.catalogue import ENTRIES

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (8, 16, 16))


def layer_of(**fields):
    config = moe.MoEConfig(**{"router": moe.Switch(), **fields})
    return moe.MoE(config, width=16, mlp_width=32, num_experts=8, key=KEY)


def test_it_is_called_with_tokens_alone():
    layer = layer_of()
    y, report = layer(X)
    assert y.shape == X.shape
    assert float(report.statistics["load"].sum()) == pytest.approx(1)
    assert float(report.auxiliary_loss) > 0
    jitted, _ = nnx.jit(lambda layer, x: layer(x))(layer, X)
    np.testing.assert_allclose(y, jitted, rtol=1e-6, atol=1e-6)


def test_later_calls_are_compiled():
    """Outside jit a shard_map runs operation by operation, which takes seconds each time."""
    layer = layer_of()
    layer(X)
    start = time.perf_counter()
    for _ in range(5):
        jax.block_until_ready(layer(X)[0])
    assert time.perf_counter() - start < 2.0  # Milliseconds, on an idle machine.


def test_gradients_outside_jit_equal_those_inside():
    layer = layer_of()

    def loss(layer):
        y, report = layer(X, mode=moe.Mode.TRAIN, key=KEY)
        return (y**2).mean() + report.auxiliary_loss

    eager, jitted = nnx.grad(loss)(layer), nnx.jit(nnx.grad(loss))(layer)
    for got, want in zip(jax.tree.leaves(eager), jax.tree.leaves(jitted), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)
    assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(eager))


@pytest.mark.parametrize("inside", [True, False], ids=["built inside", "built before"])
def test_under_a_mesh_it_is_laid_out_as_the_table_says(inside):
    """Experts are split over their devices wherever the layer was built."""
    mesh = moe.make_mesh("data:2,expert:4")
    want, _ = layer_of(shared_experts=1)(X)
    layer = None if inside else layer_of(shared_experts=1)
    with jax.set_mesh(mesh):
        layer = layer or layer_of(shared_experts=1)
        got, _ = layer(X)
        w_in = layer.w_in[...]
    assert tuple(w_in.sharding.spec)[:2] == ("expert", "data")
    assert {shard.data.shape for shard in w_in.addressable_shards} == {(2, 8, 32)}
    np.testing.assert_allclose(jax.device_get(got), want, rtol=1e-5, atol=1e-6)


def test_a_group_is_one_row_unless_its_size_is_said():
    """A row alone and in a batch gives the same; with groups over rows tokens compete for slots."""
    capacity = moe.Capacity(train_factor=0.5, evaluation_factor=0.5)
    one, together = layer_of(capacity=capacity), layer_of(capacity=capacity, group_rows=8)
    alone = jnp.concatenate([one(X[i : i + 1])[0] for i in range(8)])
    np.testing.assert_allclose(one(X)[0], alone, rtol=1e-5, atol=1e-6)
    assert np.abs(together(X)[0] - alone).max() > 1e-3
    tokens = layer_of(capacity=capacity, group_size=8 * 16)
    np.testing.assert_array_equal(together(X)[0], tokens(X)[0])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"group_size": -1}, "moe.group_size is -1; it must be at least 1 token, or 0"),
        ({"group_rows": 0}, "moe.group_rows is 0; it must be at least 1"),
        ({"group_size": 8, "group_rows": 2}, "which both say how large a group is"),
    ],
)
def test_impossible_groups_are_refused(fields, message):
    with pytest.raises(moe.UserError, match=message):
        layer_of(**fields)


def test_what_is_missing_is_said():
    with pytest.raises(moe.UserError, match="key is None; give the layer a PRNG key"):
        moe.MoE(moe.MoEConfig(), width=16, mlp_width=32, num_experts=8)
    layer = layer_of(router=moe.HashRouter(vocab_size=64))
    with pytest.raises(moe.UserError, match="HashRouter routes by token ids; give info=TokenInfo"):
        layer(X)
    ids = jnp.arange(8 * 16).reshape(8, 16) % 64
    y, _ = layer(X, moe.TokenInfo.of(ids))
    assert np.abs(y).max() > 0


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_only_routers_that_read_token_ids_say_so(entry):
    """With other ids the outputs of the others are the same."""
    capacity = entry.capacity or moe.Capacity()
    layer = layer_of(router=entry.router, group_size=64, capacity=capacity)
    ids = jax.random.randint(KEY, (2, 8, 8), 0, 264)
    first, second = (layer(X[:, :8], moe.TokenInfo.of(some))[0] for some in ids)
    assert bool((first != second).any()) == entry.router.reads_token_ids
