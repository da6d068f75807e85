import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from moe_jax.dispatch import gather
from moe_jax.parallel.mesh import EXPERT, MeshConfig, make_mesh
from moe_jax.routing.assignment import ExpertAssignment, SoftAssignment, TokenAssignment
from tests import reference

D, F = 3, 4
# (S, K, E, C): one of each, fewer tokens than experts, drops, room for everything.
SHAPES = [(1, 1, 1, 1), (2, 2, 5, 1), (8, 2, 3, 2), (7, 1, 4, 7)]
FIRST = 20  # Index of the group's first token.


def dispatched(x, assignment, feed_forward, *weights):
    """The output of one group whose tokens have the indices 20, 21, ..."""
    token_index = FIRST + jnp.arange(len(x), dtype=jnp.int32)

    def run(x, assignment, token_index, *weights):
        return gather.Gather().apply(
            x[None], *jax.tree.map(lambda a: a[None], (assignment, token_index)),
            lambda *rows: feed_forward(*rows, *weights), len(weights[0]), EXPERT,
        )[0]  # fmt: skip

    sharded = jax.shard_map(
        run,
        mesh=make_mesh(MeshConfig()),
        in_specs=(*(PartitionSpec(),) * 3, *(PartitionSpec(EXPERT),) * len(weights)),
        out_specs=PartitionSpec(EXPERT),
    )
    return sharded(x, assignment, token_index, *weights)


@jax.jit
def apply(x, assignment, weights, w_in, w_out, cotangent):
    """The output of one group, and the gradient of <output, cotangent>.

    `weights` are the assignment's differentiable fields.
    """

    def feed_forward(rows, _, w_in, w_out):
        hidden = jax.nn.relu(jnp.einsum("erd,edf->erf", rows, w_in))
        return jnp.einsum("erf,efd->erd", hidden, w_out)

    def output(x, weights, w_in, w_out):
        filled = dataclasses.replace(assignment, **weights)
        return dispatched(x, filled, feed_forward, w_in, w_out)

    y, pullback = jax.vjp(output, x, weights, w_in, w_out)
    return y, pullback(cotangent)


def assert_equal_to_loop(loop, x, assignment, weights, w_in, w_out, cotangent):
    y, gradients = apply(x, assignment, weights, w_in, w_out, cotangent)
    expected, pullback = jax.vjp(loop, *jax.tree.map(jnp.array, (x, weights, w_in, w_out)))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    jax.tree.map(
        lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5),
        gradients,
        pullback(jnp.array(cotangent)),
    )
    return np.asarray(y)


def one_expert(row, w_in, w_out):
    return jnp.maximum(row @ w_in, 0) @ w_out


@st.composite
def groups(draw):
    shape = draw(st.sampled_from(SHAPES))
    tokens, choices, num_experts, _ = shape
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    # A few favourites, so that experts overflow and others stay empty.
    favour = rng.exponential(size=num_experts) * draw(st.sampled_from([0, 1, 10]))
    preference = rng.normal(size=(tokens, num_experts)) + favour
    experts = np.argsort(-preference, axis=1)[:, :choices].astype(np.int32)
    return shape, experts, rng.random(tokens) < 0.9, rng


def numbers(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def layer(rng, tokens, num_experts):
    """x, expert weights and cotangent."""
    shapes = ((tokens, D), (num_experts, D, F), (num_experts, F, D), (tokens, D))
    return [numbers(rng, *shape) for shape in shapes]


@given(groups())
@settings(max_examples=25, deadline=None)
def test_token_choice_and_its_gradients_equal_the_loop(case):
    (tokens, choices, num_experts, capacity), experts, mask, rng = case
    x, w_in, w_out, cotangent = layer(rng, tokens, num_experts)
    slots = reference.slots_in_token_order(experts, mask, capacity)
    served = slots < capacity
    gates = numbers(rng, tokens, choices)

    def loop(x, weights, w_in, w_out):
        return reference.expert_sum(x, experts, served, weights["gates"], w_in, w_out)

    assignment = TokenAssignment(experts, slots.astype(np.int32), gates, capacity)
    y = assert_equal_to_loop(loop, x, assignment, {"gates": gates}, w_in, w_out, cotangent)
    assert not y[~served.any(axis=1)].any(), "a dropped token's output is not 0"


@given(st.integers(0, 2**32 - 1), st.sampled_from(SHAPES))
@settings(max_examples=10, deadline=None)
def test_expert_choice_and_its_gradients_equal_the_loop(seed, shape):
    tokens, _, num_experts, capacity = shape
    rng = np.random.default_rng(seed)
    x, w_in, w_out, cotangent = layer(rng, tokens, num_experts)
    capacity = min(capacity + 1, tokens)
    taken = np.stack([rng.permutation(tokens)[:capacity] for _ in range(num_experts)])
    taken[rng.random(taken.shape) < 0.2] = tokens  # Empty slots.
    gates = numbers(rng, num_experts, capacity)

    def loop(x, weights, w_in, w_out):
        rows = [jnp.zeros(D) for _ in range(tokens)]
        for expert in range(num_experts):
            for slot, token in enumerate(taken[expert]):
                if token < tokens:
                    out = one_expert(x[token], w_in[expert], w_out[expert])
                    rows[token] = rows[token] + weights["gates"][expert, slot] * out
        return jnp.stack(rows)

    assignment = ExpertAssignment(taken.astype(np.int32), gates)
    y = assert_equal_to_loop(loop, x, assignment, {"gates": gates}, w_in, w_out, cotangent)
    assert not y[~np.isin(np.arange(tokens), taken)].any(), "an untaken token's output is not 0"


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=5, deadline=None)
def test_soft_mixtures_and_their_gradients_equal_the_loop(seed):
    tokens, num_experts, slots = 5, 3, 2
    rng = np.random.default_rng(seed)
    x, w_in, w_out, cotangent = layer(rng, tokens, num_experts)
    names = ("dispatch", "combine")
    weights = {name: numbers(rng, tokens, num_experts, slots) for name in names}

    def loop(x, weights, w_in, w_out):
        rows = [jnp.zeros(D) for _ in range(tokens)]
        for e in range(num_experts):
            for p in range(slots):
                mixed = sum(weights["dispatch"][s, e, p] * x[s] for s in range(tokens))
                out = one_expert(mixed, w_in[e], w_out[e])
                rows = [row + weights["combine"][s, e, p] * out for s, row in enumerate(rows)]
        return jnp.stack(rows)

    assert_equal_to_loop(loop, x, SoftAssignment(**weights), weights, w_in, w_out, cotangent)


def test_experts_learn_which_token_is_in_each_row():
    # Expert 0 has tokens 2 and 0, expert 1 has token 2 and an empty slot; token 1 has none.
    chosen = ExpertAssignment(jnp.array([[2, 0], [2, 3]], jnp.int32), jnp.ones((2, 2)))
    # Slot 0 of each expert passes for token 20 and slot 1 for token 21; token 1 reads slots 1 and 3.
    combine = jnp.zeros((3, 2, 2)).at[1, :, 1].set(1.0)
    mixed = SoftAssignment(jnp.ones((3, 2, 2)), combine)

    def index_of(rows, index, _):
        return jnp.broadcast_to(index[..., None], rows.shape).astype(rows.dtype)

    for assignment, expected in ((chosen, [20, 0, 44]), (mixed, [0, 42, 0])):
        y = dispatched(jnp.ones((3, 1)), assignment, index_of, jnp.zeros((2, 1)))
        np.testing.assert_array_equal(y[:, 0], expected)


@pytest.fixture
def assignment():
    """Two experts of two slots; token 2 lost its second choice, token 3 everything."""
    experts = jnp.array([[0, 1], [1, 0], [0, 1], [0, 1]], jnp.int32)
    slots = jnp.array([[0, 0], [1, 1], [2, 2], [2, 2]], jnp.int32).at[2, 1].set(1)
    slots = slots.at[1, 0].set(2)
    return TokenAssignment(experts, slots, jnp.array([[1.0, 2.0]] * 4), capacity=2)


def test_slot_table_by_hand(assignment):
    np.testing.assert_array_equal(gather.slot_table(assignment, 3), [[0, 1], [0, 2], [4, 4]])


def test_fill_leaves_zeros_in_empty_slots():
    table = jnp.array([[1, 2], [0, 0]])
    rows = gather.fill(jnp.array([[1.0, 2.0], [3.0, 4.0]]), table)
    np.testing.assert_array_equal(rows, [[[3, 4], [0, 0]], [[1, 2], [1, 2]]])


def test_combine_by_hand(assignment):
    buffers = jnp.arange(1.0, 5.0).reshape(2, 2, 1)
    y = gather.combine(buffers, assignment, 4)
    # 1*1 + 2*3; second choice only; second choice only; nothing.
    np.testing.assert_array_equal(y, [[7], [4], [8], [0]])


def test_combine_sums_in_float32_and_keeps_the_dtype(assignment):
    buffers = jnp.full((2, 2, 1), 1 / 3, jnp.bfloat16)
    y = gather.combine(buffers, assignment, 4)
    assert y.dtype == jnp.bfloat16
    assert y[0, 0] == (3 * buffers[0, 0, 0].astype(jnp.float32)).astype(jnp.bfloat16)


CHOSEN = ExpertAssignment(
    jnp.array([[1, 0], [1, 3]], jnp.int32), jnp.array([[10.0, 1.0], [5.0, 7.0]])
)


def test_expert_choice_by_hand():
    np.testing.assert_array_equal(gather.slot_table(CHOSEN, 2), CHOSEN.tokens)
    y = gather.combine(jnp.arange(1.0, 5.0).reshape(2, 2, 1), CHOSEN, 3)
    # 1*2; 10*1 + 5*3; nothing. The slot with 4 is empty and its gate is not read.
    np.testing.assert_array_equal(y, [[2], [25], [0]])


def test_expert_choice_sums_in_float32_and_keeps_the_dtype():
    # One after the other in bfloat16, 256 + 1 + 1 stays 256.
    ones = jnp.ones((3, 1, 1), jnp.bfloat16)
    chosen = ExpertAssignment(jnp.zeros((3, 1), jnp.int32), jnp.array([[256.0], [1.0], [1.0]]))
    y = gather.combine(ones, chosen, 1)
    assert y.dtype == jnp.bfloat16
    assert y[0, 0] == 258
