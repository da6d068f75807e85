import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from moe_jax.dispatch import ragged
from moe_jax.parallel.mesh import EXPERT, MeshConfig, make_mesh

X, ROWS, WIDTH = 4, 12, 2


def send(rows, sizes, room):
    """What every device has received, and the gradient of <received, received> returned."""

    def one_device(rows, sizes):
        routes = ragged.plan(sizes[0], EXPERT, room)
        received, pullback = jax.vjp(lambda r: ragged.exchange(r, room, routes, EXPERT), rows[0])
        there_and_back = ragged.exchange(received, ROWS, routes[::-1], EXPERT)
        return received[None], pullback(2 * received)[0][None], there_and_back[None]

    return jax.shard_map(
        one_device,
        mesh=make_mesh(MeshConfig(expert=X)),
        in_specs=PartitionSpec(EXPERT),
        out_specs=PartitionSpec(EXPERT),
    )(rows, sizes)


jitted = functools.partial(jax.jit, static_argnums=2)(send)


def by_hand(rows, sizes, room):
    received, returned = np.zeros((X, room, WIDTH)), np.zeros_like(rows)
    filled = np.zeros(X, int)
    for sender in range(X):
        start = 0
        for receiver in range(X):
            kept = min(sizes[sender, receiver], room - filled[receiver])
            place = slice(filled[receiver], filled[receiver] + kept)
            received[receiver, place] = rows[sender, start : start + kept]
            returned[sender, start : start + kept] = rows[sender, start : start + kept]
            filled[receiver] += kept
            start += sizes[sender, receiver]
    return received, returned


@given(st.integers(0, 2**32 - 1), st.sampled_from([X * ROWS, 5]))
@settings(max_examples=20, deadline=None)
def test_equals_a_loop_over_senders_and_comes_back(seed, room):
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(X, ROWS, WIDTH)).astype(np.float32)
    # Some devices get nothing from anybody; sums are at most ROWS.
    shares = rng.dirichlet(np.full(X, 0.3), size=X)
    sizes = np.floor(shares * rng.integers(0, ROWS + 1, size=(X, 1))).astype(np.int32)
    received, gradient, returned = jitted(rows, sizes, room)
    want_received, want_returned = by_hand(rows, sizes, room)
    np.testing.assert_array_equal(received, want_received.astype(np.float32))
    np.testing.assert_array_equal(returned, want_returned)
    np.testing.assert_array_equal(gradient, 2 * want_returned)


def test_rows_that_nothing_is_received_into_keep_the_output_and_wrong_sizes_show():
    def one_device(rows, sizes, wrong):
        offsets = jnp.cumsum(sizes[0]) - sizes[0]
        one_each = jnp.full(X, 1, jnp.int32)
        place = jnp.full(X, jax.lax.axis_index(EXPERT), jnp.int32)
        return ragged.by_all_gather(
            rows[0], jnp.full_like(rows[0], 7), offsets, one_each, place, one_each - wrong[0],
            axis_name=EXPERT,
        )[None]  # fmt: skip

    run = jax.jit(
        jax.shard_map(
            one_device,
            mesh=make_mesh(MeshConfig(expert=X)),
            in_specs=PartitionSpec(EXPERT),
            out_specs=PartitionSpec(EXPERT),
        )
    )
    rows = jnp.arange(X * ROWS * WIDTH, dtype=jnp.float32).reshape(X, ROWS, WIDTH)
    sizes = jnp.ones((X, X), jnp.int32)
    got = run(rows, sizes, jnp.zeros((X, X), jnp.int32))
    for receiver in range(X):
        np.testing.assert_array_equal(got[receiver, :X], rows[:, receiver])
        assert (got[receiver, X:] == 7).all()
    wrong = run(rows, sizes, jnp.zeros((X, X), jnp.int32).at[2, 1].set(1))
    assert (wrong[2, 1] == 7).all()


def test_who_comes_later_loses_first():
    sizes = np.zeros((X, X), np.int32)
    sizes[:, 2] = 3
    rows = np.ones((X, ROWS, WIDTH), np.float32) * np.arange(1, X + 1)[:, None, None]
    received, _, _ = jitted(rows, sizes, 5)
    np.testing.assert_array_equal(received[2, :, 0], [1, 1, 1, 2, 2])
