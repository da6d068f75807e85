import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from moe_jax.dispatch import dropless
from moe_jax.dispatch.dropless import Dropless, Method, Tokens
from moe_jax.dispatch.exchange import Transport
from moe_jax.dispatch.grouped_matmul import interface
from moe_jax.dispatch.grouped_matmul.interface import Backend, GroupedMatmul
from moe_jax.errors import UserError
from moe_jax.layers.mode import Mode
from moe_jax.layers.moe import MoE, MoEConfig, TokenInfo
from moe_jax.parallel.mesh import MeshConfig, make_mesh
from moe_jax.routing.capacity import Capacity
from moe_jax.routing.deepseek import DeepSeekV3
from moe_jax.routing.router import RouterInputs
from moe_jax.routing.token_choice import TopK

OWNERS = 4
SORT = jax.jit(dropless.sort_by_owner, static_argnums=1)
TABLE = jax.jit(dropless.rows_of_owners, static_argnums=3)
JOINED = jax.jit(dropless.rows_one_after_another, static_argnums=3)


@given(arrays.arrays(np.int32, (7, 3), elements=st.integers(0, OWNERS)))
@settings(max_examples=30, deadline=None)
def test_order_and_rows_by_owner(owners):
    order, sizes = jax.device_get(SORT(owners, OWNERS))
    flat, none = owners.ravel(), owners.size
    np.testing.assert_array_equal(order, np.argsort(flat, kind="stable"))
    np.testing.assert_array_equal(sizes, [np.sum(flat == o) for o in range(OWNERS)])
    starts = np.cumsum(sizes) - sizes
    # Without the first of each owner, and two rows at most.
    skipped, taken = np.minimum(sizes, 1), np.clip(sizes - 1, 0, 2)
    of_owner = [np.flatnonzero(flat == o)[1:3].tolist() for o in range(OWNERS)]
    table = TABLE(order, starts + skipped, taken, 3)
    np.testing.assert_array_equal(table, [(rows + [none] * 3)[:3] for rows in of_owner])
    joined = JOINED(order, starts + skipped, taken, 12)
    rows = [row for rows in of_owner for row in rows]
    np.testing.assert_array_equal(joined, (rows + [none] * 12)[:12])


def tokens_of(chosen):
    count, choices = chosen.shape
    zeros = jnp.zeros((count, choices))
    return Tokens(jnp.zeros((count, 1)), jnp.array(chosen), zeros, jnp.zeros(count, jnp.int32))


@given(arrays.arrays(np.int32, (6, 4), elements=st.integers(0, 12)), st.sampled_from([1, 3, 4]))
@settings(max_examples=30, deadline=None)
def test_a_token_is_sent_once_to_each_device_that_it_needs(chosen, devices):
    """12 experts; 12 stands for no choice."""
    here = 12 // devices
    owners = np.asarray(tokens_of(chosen).owners(here, devices))
    for row, choices in zip(owners, chosen, strict=True):
        needed = {int(e) // here for e in choices if e < 12}
        sent = [int(device) for device in row if device < devices]
        assert sorted(sent) == sorted(needed)


def test_device_limited_routing_bounds_messages():
    # 4 choices among the 12 experts of 2 of 4 groups, each of which is on a device of its own.
    router, count = DeepSeekV3(k=4, groups=4, groups_per_token=2), 50
    x = jax.random.normal(jax.random.key(0), (count, 8))
    parameters = router.init(jax.random.key(1), 8, 12) | router.init_state(12)
    numbers, key = jnp.arange(count), jax.random.key(2)
    inputs = RouterInputs(x, numbers >= 0, numbers, numbers, 0 * numbers, key, key, train=True)
    route = jax.jit(lambda inputs: router.route(parameters, inputs, 12, count))
    chosen = np.asarray(route(inputs).assignment.experts)
    owners = np.asarray(tokens_of(chosen).owners(3, 4))
    assert (owners < 4).sum(axis=1).max() == 2


B, L, D, F, E = 8, 8, 4, 8, 8


@pytest.mark.parametrize("transport", Transport)
def test_what_bounded_buffers_lose_is_counted(transport):
    dispatch = Dropless(transport, buffer_factor=1.0)
    config = MoEConfig(TopK(), group_size=L, dispatch=dispatch)
    config.validate(E)
    model = MoE(config, D, F, E, scale=1.0, key=jax.random.key(0))
    model.router["weights"][...] = jnp.zeros((D, E))  # All tokens go to expert 0.
    graph, state = nnx.split(model)

    @jax.jit
    def run(state, x):
        info = TokenInfo.of(jnp.zeros((B, L), jnp.int32))
        return nnx.merge(graph, state)(x, info, Mode.TRAIN, None)

    with jax.set_mesh(make_mesh(MeshConfig(expert=8))):
        y, report = run(state, jax.random.normal(jax.random.key(1), (B, L, D)))
    # Its device has room for the 8 rows that each device gets at balance.
    assert report.statistics["overflow"] == pytest.approx((B * L - 8) / (B * L))
    assert report.statistics["dropped"] == 0
    assert np.any(np.asarray(y) != 0, axis=-1).sum() == 8


def test_capacity_beside_dropless_is_refused():
    config = MoEConfig(TopK(), Capacity(train_factor=2.0), dispatch=Dropless())
    with pytest.raises(UserError, match=r"moe.capacity is .*2.0.*Dropless, which serves every"):
        config.validate(E)


def test_backends_beside_spill_are_refused():
    dispatch = Dropless(
        method=Method.SPILL, grouped_matmul=GroupedMatmul(forward=Backend.RAGGED_DOT)
    )
    with pytest.raises(UserError, match="method is spill, which makes no grouped products"):
        dispatch.validate(TopK())


def test_a_forced_backend_is_used_on_cpus_too(caplog):
    dispatch = Dropless(grouped_matmul=GroupedMatmul(forward=Backend.REFERENCE))
    config = MoEConfig(TopK(), group_size=L, dispatch=dispatch)
    model = MoE(config, D, F, E, scale=1.0, key=jax.random.key(0))
    info = TokenInfo.of(jnp.zeros((B, L), jnp.int32))
    for log in (dropless._log_once, interface._log_once):
        log.cache_clear()  # Other tests may have logged the same.
    run = functools.partial(model, info=info, mode=Mode.EVALUATE, key=None)
    with caplog.at_level("INFO", "moe_jax"):
        jax.eval_shape(run, jnp.zeros((B, L, D)))
    assert "method grouped" in caplog.text
    assert "forward reference" in caplog.text
