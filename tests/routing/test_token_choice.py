import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe_jax.errors import UserError
from moe_jax.routing.assignment import RouterInputs
from moe_jax.routing.token_choice import TopK, slots_in_token_order
from tests import reference

S, D, E = 12, 6, 5


def inputs(x, mask=None, key=None, train=False):
    zeros = jnp.zeros(len(x), jnp.int32)
    mask = jnp.ones(len(x), bool) if mask is None else mask
    return RouterInputs(x, mask, zeros, zeros, zeros, key, train)


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(0), (S, D))


@pytest.fixture(scope="module")
def parameters():
    return {"weights": jax.random.normal(jax.random.key(1), (D, E))}


@functools.partial(jax.jit, static_argnames=("num_experts", "capacity"))
def jitted_slots(experts, mask, num_experts, capacity):
    return slots_in_token_order(experts, mask, num_experts, capacity)


@st.composite
def choices(draw):
    """(experts [S, K], mask [S], E, C): every token has K different experts."""
    num_experts = draw(st.integers(1, 7))
    tokens, k = draw(st.integers(1, 12)), draw(st.integers(1, min(num_experts, 3)))
    orders = draw(st.lists(st.permutations(range(num_experts)), min_size=tokens, max_size=tokens))
    mask = draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens))
    experts = np.array([order[:k] for order in orders], np.int32)
    return experts, np.array(mask), num_experts, draw(st.integers(1, tokens))


@given(choices())
@example((np.array([[0]], np.int32), np.array([True]), 1, 1))  # One token, one expert.
@example((np.full((6, 1), 2, np.int32), np.ones(6, bool), 5, 2))  # All to one expert.
@example((np.array([[4, 1], [1, 4]], np.int32), np.ones(2, bool), 7, 1))  # S < E.
@settings(max_examples=40, deadline=None, derandomize=True)
def test_slots_equal_the_loop(case):
    experts, mask, num_experts, capacity = case
    slots = np.asarray(jitted_slots(experts, mask, num_experts, capacity))
    np.testing.assert_array_equal(slots, reference.slots_in_token_order(experts, mask, capacity))
    served = slots < capacity
    places = list(zip(experts[served], slots[served], strict=True))
    assert len(set(places)) == len(places), "two tokens in one slot"
    assert slots.min() >= 0
    if capacity == len(experts):
        assert served[mask].all(), "dropped although every token has room"
    assert not served[~mask].any(), "padding took a slot"


@pytest.mark.parametrize("k", [1, 2, 5])
def test_gates_are_the_k_largest_probabilities(x, parameters, k):
    assignment = TopK(k=k).route(parameters, inputs(x), E, S).assignment
    probabilities = np.asarray(jax.nn.softmax(x @ parameters["weights"]))
    np.testing.assert_array_equal(assignment.experts, reference.top_k(probabilities, k))
    np.testing.assert_allclose(assignment.gates, -np.sort(-probabilities)[:, :k], rtol=1e-5)
    assert assignment.experts.dtype == jnp.int32


def test_renormalized_gates_sum_to_one_and_keep_their_ratios(x, parameters):
    plain = TopK(k=2).route(parameters, inputs(x), E, S).assignment.gates
    gates = TopK(k=2, renormalize=True).route(parameters, inputs(x), E, S).assignment.gates
    np.testing.assert_allclose(gates.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(gates[:, 0] / gates[:, 1], plain[:, 0] / plain[:, 1], rtol=1e-5)


def test_gate_scale_multiplies_the_gates(x, parameters):
    for renormalize in (False, True):
        plain, scaled = (
            TopK(k=2, renormalize=renormalize, gate_scale=scale).route(parameters, inputs(x), E, S)
            for scale in (1.0, 2.5)
        )
        np.testing.assert_allclose(scaled.assignment.gates, 2.5 * plain.assignment.gates, rtol=1e-6)
        np.testing.assert_array_equal(
            scaled.losses["router_z"].total, plain.losses["router_z"].total
        )


def test_equal_logits_go_to_the_first_experts(x):
    assignment = TopK(k=2).route({"weights": jnp.zeros((D, E))}, inputs(x), E, S).assignment
    np.testing.assert_array_equal(assignment.experts, np.tile([0, 1], (S, 1)))


def test_jitter_only_in_training_and_reproducible_from_the_key(x, parameters):
    def gates(jitter, train, seed=0):
        router, key = TopK(jitter=jitter), jax.random.key(seed)
        return router.route(parameters, inputs(x, key=key, train=train), E, S).assignment.gates

    np.testing.assert_array_equal(gates(0.1, train=False), gates(0.0, train=False))
    np.testing.assert_array_equal(gates(0.1, train=True), gates(0.1, train=True))
    assert (gates(0.1, train=True) != gates(0.0, train=True)).any()
    assert (gates(0.1, train=True) != gates(0.1, train=True, seed=1)).any()
    # Bounded: 1 +- epsilon on every input moves a logit by at most epsilon * |x| |w|.
    np.testing.assert_allclose(gates(1e-4, train=True), gates(0.0, train=True), atol=1e-3)


def test_the_router_works_in_float32_under_bfloat16_input(x, parameters):
    narrow = x.astype(jnp.bfloat16)
    got = TopK(k=2).route(parameters, inputs(narrow), E, S)
    wide = TopK(k=2).route(parameters, inputs(narrow.astype(jnp.float32)), E, S)
    assert got.assignment.gates.dtype == jnp.float32
    assert {m.total.dtype for m in [*got.losses.values(), *got.statistics.values()]} == {
        jnp.dtype(jnp.float32)
    }
    jax.tree.map(np.testing.assert_array_equal, got, wide)


def test_padding_enters_nothing(x, parameters):
    mask = jnp.arange(S) % 3 != 1
    router = TopK(k=2)
    padded = router.route(parameters, inputs(x, mask), E, 2)
    alone = router.route(parameters, inputs(x[mask]), E, 2)
    for name in ("experts", "slots", "gates"):
        np.testing.assert_allclose(
            getattr(padded.assignment, name)[mask], getattr(alone.assignment, name), rtol=1e-6
        )
    assert (padded.assignment.slots[~mask] == 2).all()
    for got, expected in ((padded.losses, alone.losses), (padded.statistics, alone.statistics)):
        for name, mean in got.items():
            np.testing.assert_allclose(
                mean.value(), expected[name].value(), rtol=1e-5, err_msg=name
            )


@pytest.mark.parametrize("capacity", [2, S])
def test_routing_is_causal_with_and_without_drops(x, parameters, capacity):
    router, t = TopK(k=2), 7
    changed = x.at[t].set(-3 * x[t])
    before, after = (
        router.route(parameters, inputs(value), E, capacity).assignment for value in (x, changed)
    )
    assert (before.slots[:t] == capacity).any() == (capacity < S)
    for name in ("experts", "slots", "gates"):
        np.testing.assert_array_equal(getattr(before, name)[:t], getattr(after, name)[:t])
    assert (before.experts[t] != after.experts[t]).any()


def test_loss_weights_name_the_losses(x, parameters):
    router = TopK(load_balancing_weight=0.5, z_weight=0.25)
    routing = router.route(parameters, inputs(x), E, S)
    assert router.loss_weights == {"load_balancing": 0.5, "router_z": 0.25}
    assert routing.losses.keys() == router.loss_weights.keys()


@pytest.mark.parametrize(
    ("router", "message"),
    [
        (TopK(k=6), r"router.k is 6 but there are 5 experts; choose k between 1"),
        (TopK(k=0), r"router.k is 0 but there are 5 experts; choose k between 1"),
        (TopK(gate_scale=0.0), r"router.gate_scale is 0.0; it must be above 0"),
        (TopK(jitter=1.0), r"router.jitter is 1.0; it must be in \[0, 1\)"),
        (TopK(jitter=-0.1), r"router.jitter is -0.1; it must be in \[0, 1\)"),
    ],
)
def test_bad_fields_are_named(router, message):
    with pytest.raises(UserError, match=message):
        router.validate(E)
