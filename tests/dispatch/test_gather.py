import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from moe_jax.dispatch import gather
from moe_jax.parallel.mesh import EXPERT, MeshConfig, make_mesh
from moe_jax.routing.assignment import TokenChoice
from moe_jax.routing.token_choice import slots_in_token_order
from tests import reference

D, F = 3, 4
# (S, K, E, C): one of each, fewer tokens than experts, drops, room for everything.
SHAPES = [(1, 1, 1, 1), (2, 2, 5, 1), (8, 2, 3, 2), (7, 1, 4, 7)]


@functools.partial(jax.jit, static_argnames=("num_experts", "capacity"))
def apply(x, experts, gates, mask, w_in, w_out, cotangent, num_experts, capacity):
    """The output of one group, and the gradient of <output, cotangent>."""

    def output(x, gates, w_in, w_out):
        slots = slots_in_token_order(experts, mask, num_experts, capacity)
        assignment = TokenChoice(experts, slots, gates, capacity)
        token_index = jnp.arange(len(x), dtype=jnp.int32)

        def run(x, assignment, w_in, w_out):
            def feed_forward(rows, _):
                hidden = jax.nn.relu(jnp.einsum("erd,edf->erf", rows, w_in))
                return jnp.einsum("erf,efd->erd", hidden, w_out)

            return gather.Gather().apply(
                x[None], *jax.tree.map(lambda a: a[None], (assignment, token_index)),
                feed_forward, num_experts, EXPERT,
            )[0]  # fmt: skip

        mesh = make_mesh(MeshConfig())
        sharded = jax.shard_map(
            run,
            mesh=mesh,
            in_specs=(PartitionSpec(), PartitionSpec(), *(PartitionSpec(EXPERT),) * 2),
            out_specs=PartitionSpec(EXPERT),
        )
        return sharded(x, assignment, w_in, w_out)

    y, pullback = jax.vjp(output, x, gates, w_in, w_out)
    return y, pullback(cotangent)


@st.composite
def groups(draw):
    shape = draw(st.sampled_from(SHAPES))
    tokens, choices, num_experts, _ = shape
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    # A few favourites, so that experts overflow and others stay empty.
    favour = rng.exponential(size=num_experts) * draw(st.sampled_from([0, 1, 10]))
    preference = rng.normal(size=(tokens, num_experts)) + favour
    experts = np.argsort(-preference, axis=1)[:, :choices].astype(np.int32)
    arrays = [
        rng.normal(size=size).astype(np.float32)
        for size in (
            (tokens, D), (tokens, choices), (num_experts, D, F), (num_experts, F, D), (tokens, D)
        )
    ]  # fmt: skip
    return shape, experts, rng.random(tokens) < 0.9, arrays


@given(groups())
@settings(max_examples=25, deadline=None, derandomize=True)
def test_output_and_gradients_equal_the_loop(group):
    (_, _, num_experts, capacity), experts, mask, (x, gates, w_in, w_out, cotangent) = group
    served = reference.slots_in_token_order(experts, mask, capacity) < capacity
    y, gradients = apply(
        x, experts, gates, mask, w_in, w_out, cotangent,
        num_experts=num_experts, capacity=capacity,
    )  # fmt: skip

    def loop(x, gates, w_in, w_out):
        return reference.expert_sum(x, experts, served, gates, w_in, w_out)

    expected, pullback = jax.vjp(loop, *map(jnp.array, (x, gates, w_in, w_out)))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    for got, want in zip(gradients, pullback(jnp.array(cotangent)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert not y[~served.any(axis=1)].any(), "a dropped token's output is not 0"


@pytest.fixture
def assignment():
    """Two experts of two slots; token 2 lost its second choice, token 3 everything."""
    experts = jnp.array([[0, 1], [1, 0], [0, 1], [0, 1]], jnp.int32)
    slots = jnp.array([[0, 0], [1, 1], [2, 2], [2, 2]], jnp.int32).at[2, 1].set(1)
    slots = slots.at[1, 0].set(2)
    return TokenChoice(experts, slots, jnp.array([[1.0, 2.0]] * 4), capacity=2)


def test_slot_table_by_hand(assignment):
    np.testing.assert_array_equal(gather.slot_table(assignment, 3), [[0, 1], [0, 2], [4, 4]])


def test_fill_leaves_zeros_in_empty_slots():
    table = jnp.array([[1, 2], [0, 0]])
    rows = gather.fill(jnp.array([[1.0, 2.0], [3.0, 4.0]]), table)
    np.testing.assert_array_equal(rows, [[[3, 4], [0, 0]], [[1, 2], [1, 2]]])


def test_combine_by_hand(assignment):
    buffers = jnp.arange(1.0, 5.0).reshape(2, 2, 1)
    y = gather.combine(buffers, assignment)
    # 1*1 + 2*3; second choice only; second choice only; nothing.
    np.testing.assert_array_equal(y, [[7], [4], [8], [0]])


def test_combine_sums_in_float32_and_keeps_the_dtype(assignment):
    buffers = jnp.full((2, 2, 1), 1 / 3, jnp.bfloat16)
    y = gather.combine(buffers, assignment)
    assert y.dtype == jnp.bfloat16
    assert y[0, 0] == (3 * buffers[0, 0, 0].astype(jnp.float32)).astype(jnp.bfloat16)
