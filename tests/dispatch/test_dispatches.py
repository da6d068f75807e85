"""Every dispatch equals every expert on every token, in value and in every gradient; one device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from moe_jax import reference
from moe_jax.dispatch import dropless
from moe_jax.dispatch import slots as slots_of
from moe_jax.dispatch.dropless import Dropless, Method
from moe_jax.dispatch.einsum import Einsum
from moe_jax.dispatch.gather import Gather
from moe_jax.dispatch.interface import Experts
from moe_jax.errors import UserError
from moe_jax.layers.feed_forward import FeedForwardExpert, FeedForwardForm
from moe_jax.parallel.mesh import EXPERT, MeshConfig, make_mesh
from moe_jax.routing.expert_choice import ExpertChoice
from moe_jax.routing.router import ExpertAssignment, SoftAssignment, TokenAssignment
from moe_jax.routing.token_choice import TopK

D, F = 3, 4
# (S, K, E, C): one of each, fewer tokens than experts, more rows than a block of the CPU's loop.
SHAPES = [(1, 1, 1, 1), (2, 2, 5, 1), (40, 2, 3, 20)]
FIRST = 20  # Index of the group's first token.
BY_SLOTS = {"gather": Gather(), "einsum": Einsum()}
DISPATCHES = {
    **BY_SLOTS,
    "dropless by spill": Dropless(method=Method.SPILL),
    "dropless by groups": Dropless(method=Method.GROUPED),
}


RELU = FeedForwardExpert(FeedForwardForm(), 0.0)


def dispatched(
    dispatch,
    x,
    assignment,
    weights,
    network=RELU,
    row_key=None,
):
    """The output of one group whose tokens have the indices 20, 21, ..., and the statistics."""
    token_index = FIRST + jnp.arange(len(x), dtype=jnp.int32)

    def run(x, assignment, token_index, weights):
        count = jax.tree.leaves(weights)[0].shape[0]
        experts = Experts(count, jax.lax.axis_index(EXPERT) * count, weights, network, row_key)
        grouped = jax.tree.map(lambda a: a[None], (x, assignment, token_index))
        y, statistics = dispatch.apply(*grouped, experts, EXPERT)
        return y[0], statistics

    return jax.shard_map(
        run,
        mesh=make_mesh(MeshConfig()),
        in_specs=(*(PartitionSpec(),) * 3, PartitionSpec(EXPERT)),
        out_specs=PartitionSpec(),
        check_vma=False,  # A mesh of one device; tests/layers/ has the layer's own shard_map.
    )(x, assignment, token_index, weights)


@functools.partial(jax.jit, static_argnums=0)
def apply(name, x, assignment, gates, weights, cotangent):
    """The output of one group, and the gradient of <output, cotangent>.

    `gates` are the assignment's differentiable fields.
    """

    def output(x, gates, weights):
        filled = dataclasses.replace(assignment, **gates)
        return dispatched(DISPATCHES[name], x, filled, weights)[0]

    y, pullback = jax.vjp(output, x, gates, weights)
    return y, pullback(cotangent)


def by_all_experts(mix_in, mix_out, x, weights):
    """[S, d]: every expert's slots are mixtures of tokens, every token a mixture of slots.

    `mix_in` and `mix_out` are [S, E, C].
    """
    rows = jnp.einsum("sec,sd->ecd", mix_in, x)
    hidden = jnp.maximum(jnp.einsum("ecd,edf->ecf", rows, weights["w_in"]), 0)
    outputs = jnp.einsum("ecf,efd->ecd", hidden, weights["w_out"])
    return jnp.einsum("sec,ecd->sd", mix_out, outputs)


def by_token(x, experts, served, gates, weights):
    """Every expert on every token, and of that what was chosen and served."""
    chosen = jax.nn.one_hot(jnp.where(served, experts, -1), len(weights["w_in"]))  # [S, K, E]
    everything = jnp.eye(len(x))[:, None, :] * jnp.ones((1, len(weights["w_in"]), 1))
    gated = (chosen * gates[..., None]).sum(axis=1)
    return by_all_experts(everything, everything * gated[..., None], x, weights)


def by_slot(x, tokens, gates, weights):
    """Expert choice: tokens and gates are [E, C]."""
    mix = jax.nn.one_hot(tokens, len(x), axis=0)
    return by_all_experts(mix, mix * gates, x, weights)


@functools.partial(jax.jit, static_argnums=0)
def expected(loop, cotangent, x, gates, weights, *rest):
    y, pullback = jax.vjp(
        lambda x, gates, weights: loop(x, gates, weights, *rest), x, gates, weights
    )
    return y, pullback(cotangent)


def token_loop(x, gates, weights, experts, served):
    return by_token(x, experts, served, gates["gates"], weights)


def slot_loop(x, gates, weights, tokens):
    return by_slot(x, tokens, gates["gates"], weights)


def soft_loop(x, gates, weights):
    return by_all_experts(gates["dispatch"], gates["combine"], x, weights)


def assert_equal(got, want):
    for value, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(value, other, rtol=1e-4, atol=2e-5)


def numbers(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def layer(rng, tokens, num_experts):
    """x, expert weights and cotangent."""
    weights = {"w_in": numbers(rng, num_experts, D, F), "w_out": numbers(rng, num_experts, F, D)}
    return numbers(rng, tokens, D), weights, numbers(rng, tokens, D)


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


@given(groups())
@settings(max_examples=25, deadline=None)
def test_token_choice_and_its_gradients_equal_all_experts(case):
    (tokens, choices, num_experts, capacity), experts, mask, rng = case
    x, weights, cotangent = layer(rng, tokens, num_experts)
    places = reference.slots_in_token_order(experts, mask, capacity).astype(np.int32)
    served = places < capacity
    gates = {"gates": numbers(rng, tokens, choices)}
    want = expected(token_loop, cotangent, x, gates, weights, experts, served)
    assignment = TokenAssignment(experts, places, gates["gates"], capacity)
    for name in DISPATCHES:
        y, gradients = apply(name, x, assignment, gates, weights, cotangent)
        assert_equal((y, gradients), want)
        assert not np.asarray(y)[~served.any(axis=1)].any(), "a dropped token's output is not 0"


# 128 tokens, 2 experts; at a mean of 64 rows an expert has 72 slots, and 16 rows may spill.
@pytest.mark.parametrize(
    ("loads", "slots", "looped"),
    [((64, 64), True, [0, 0]), ((80, 48), True, [8, 0]), ((128, 0), False, [128, 0])],
)
def test_slots_spill_and_the_loop_alone(loads, slots, looped):
    rng = np.random.default_rng(0)
    experts = rng.permutation(np.repeat(np.arange(2, dtype=np.int32), loads))[:, None]
    x, weights, cotangent = layer(rng, 128, 2)
    gates = {"gates": numbers(rng, 128, 1)}
    tokens = dropless.Tokens(jnp.array(x), jnp.array(experts), gates["gates"], jnp.arange(128))
    here = Experts(2, jnp.int32(0), weights, FeedForwardExpert(FeedForwardForm(), 0.0), None)
    order, sizes = dropless.sort_by_owner(tokens.chosen, 2)
    rows = dropless._rows_with_spill(
        tokens, here, order, jnp.cumsum(sizes) - sizes, sizes, room=128, balanced=128
    )
    assert bool(rows.use_slots) == slots
    np.testing.assert_array_equal(rows.sizes, looped)
    # Every assignment is in a slot or in the loop, once.
    held = np.concatenate([np.ravel(rows.slots), np.asarray(rows.looped)])
    np.testing.assert_array_equal(np.sort(held[held < 128]), np.arange(128))
    place = np.zeros((128, 1), np.int32)
    want = expected(token_loop, cotangent, x, gates, weights, experts, place < 1)
    got = apply("dropless by spill", x, TokenAssignment(experts, place, gates["gates"], 1), gates,
                weights, cotangent)  # fmt: skip
    assert_equal(got, want)


@given(st.integers(0, 2**32 - 1), st.sampled_from(SHAPES))
@settings(max_examples=10, deadline=None)
def test_expert_choice_and_its_gradients_equal_all_experts(seed, shape):
    tokens, _, num_experts, capacity = shape
    rng = np.random.default_rng(seed)
    x, weights, cotangent = layer(rng, tokens, num_experts)
    capacity = min(capacity + 1, tokens)
    taken = np.stack([rng.permutation(tokens)[:capacity] for _ in range(num_experts)])
    taken[rng.random(taken.shape) < 0.2] = tokens  # Empty slots.
    taken = taken.astype(np.int32)
    gates = {"gates": numbers(rng, num_experts, capacity)}
    want = expected(slot_loop, cotangent, x, gates, weights, taken)
    assignment = ExpertAssignment(taken, gates["gates"])
    for name in BY_SLOTS:
        y, gradients = apply(name, x, assignment, gates, weights, cotangent)
        assert_equal((y, gradients), want)
        assert not np.asarray(y)[~np.isin(np.arange(tokens), taken)].any(), (
            "an untaken token's output is not 0"
        )


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=5, deadline=None)
def test_soft_mixtures_and_their_gradients_equal_all_experts(seed):
    tokens, num_experts, count = 5, 3, 2
    rng = np.random.default_rng(seed)
    x, weights, cotangent = layer(rng, tokens, num_experts)
    gates = {name: numbers(rng, tokens, num_experts, count) for name in ("dispatch", "combine")}
    want = expected(soft_loop, cotangent, x, gates, weights)
    for name in BY_SLOTS:
        assert_equal(apply(name, x, SoftAssignment(**gates), gates, weights, cotangent), want)


@dataclasses.dataclass(frozen=True)
class TellsKeys:
    """A network whose output is the key of each row."""

    def up(self, weights, rows, product):
        return rows

    def down(self, weights, hidden, keys, product):
        number = jax.random.key_data(keys)[..., 1:]
        return jnp.broadcast_to(number, hidden.shape).astype(hidden.dtype)


# Expert 0 has tokens 2 and 0, expert 1 has token 2 and an empty slot; token 1 has none.
CHOSEN_BY_EXPERTS = ExpertAssignment(jnp.array([[2, 0], [2, 3]], jnp.int32), jnp.ones((2, 2)))
CHOSEN_BY_TOKENS = TokenAssignment(
    jnp.array([[0, 2], [2, 2], [1, 0]], jnp.int32),
    jnp.array([[0, 3], [3, 3], [0, 1]], jnp.int32),
    jnp.ones((3, 2)),
    capacity=3,
)
# Slot 0 of each expert passes for token 20 and slot 1 for token 21; token 1 reads slots 1 and 3.
MIXED = SoftAssignment(jnp.ones((3, 2, 2)), jnp.zeros((3, 2, 2)).at[1, :, 1].set(1.0))


@pytest.mark.parametrize(
    ("name", "assignment", "tokens"),
    [
        *((name, CHOSEN_BY_TOKENS, [[20], [], [22, 22]]) for name in DISPATCHES),
        *((name, CHOSEN_BY_EXPERTS, [[20], [], [22, 22]]) for name in BY_SLOTS),
        *((name, MIXED, [[], [21, 21], []]) for name in BY_SLOTS),
    ],
)
def test_experts_learn_which_token_is_in_each_row(name, assignment, tokens):

    @jax.jit
    def keys(x, assignment, weights):
        def row_key(token, expert):
            number = (100 * expert + token).astype(jnp.uint32)
            return jax.random.wrap_key_data(jnp.stack([jnp.zeros_like(number), number], axis=-1))

        return dispatched(DISPATCHES[name], x, assignment, weights, TellsKeys(), row_key)[0]

    y = keys(jnp.ones((3, 1)), assignment, {"w": jnp.zeros((2, 1, 1))})
    # A token that visits both experts, or one visit to expert 0.
    both = 100
    want = [sum(visits) + (both if len(visits) == 2 else 0) for visits in tokens]
    np.testing.assert_array_equal(y[:, 0], want)


def test_slot_index_of_an_empty_slot_is_harmless():
    index = slots_of.slot_index(jnp.array([8, 9, 10]), CHOSEN_BY_EXPERTS, 2)
    np.testing.assert_array_equal(index, [[10, 8], [10, 0]])


@pytest.mark.parametrize(
    ("dispatch", "router", "message"),
    [
        (Gather("ragged"), TopK(), "transport is ragged, but slots of Gather have a fixed size"),
        (
            Dropless(),
            ExpertChoice(),
            "Dropless, but with moe.router=ExpertChoice experts have slots",
        ),
        (Dropless(buffer_factor=0.5), TopK(), "buffer_factor is 0.5; it must be at least 1, or 0"),
        (Dropless(buffer_factor=float("inf")), TopK(), "buffer_factor is inf"),
    ],
)
def test_what_cannot_work_is_named(dispatch, router, message):
    with pytest.raises(UserError, match=message):
        dispatch.validate(router)
