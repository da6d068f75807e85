import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from moe_jax.errors import UserError
from moe_jax.routing import expert_choice
from moe_jax.routing.expert_choice import ExpertChoice
from tests.routing.inputs import group, vectors

S, D, E = 8, 4, 3


PLAIN, CAPPED = 0, 2


def router(cap):
    return ExpertChoice(cap=cap, router_z_weight=1e-3 if cap else 0.0)


@functools.partial(jax.jit, static_argnames=("cap", "capacity"))
def routed(x, mask, weights, cap, capacity):
    inputs = group(x, mask=mask)
    return router(cap).route({"weights": weights}, inputs, weights.shape[1], capacity)


def of_probabilities(p, cap, capacity, mask=None):
    """Routes tokens with the rows of p as their router probabilities: x = log p, W = 1."""
    x, experts = np.log(np.array(p, np.float32)), len(p[0])
    mask = np.ones(len(p), bool) if mask is None else np.array(mask)
    return routed(x, mask, np.eye(experts, dtype=np.float32), cap, capacity)


def test_each_expert_takes_its_most_probable_tokens_by_hand():
    p = [[0.5, 0.3, 0.2], [0.25, 0.15, 0.6], [0.1, 0.6, 0.3]]
    assignment = of_probabilities(p, PLAIN, 2).assignment
    # Columns of p, sorted: .5 .25 | .6 .3 | .6 .3.
    np.testing.assert_array_equal(assignment.tokens, [[0, 1], [2, 0], [1, 2]])
    np.testing.assert_allclose(assignment.gates, [[0.5, 0.25], [0.6, 0.3], [0.6, 0.3]], rtol=1e-5)
    assert assignment.tokens.dtype == jnp.int32


def test_slots_beyond_the_real_tokens_are_empty_by_hand():
    p = [[0.5, 0.5], [0.9, 0.1], [0.3, 0.7]]
    assignment = of_probabilities(p, PLAIN, 3, mask=[True, False, True]).assignment
    np.testing.assert_array_equal(assignment.tokens, [[0, 2, 3], [2, 0, 3]])
    np.testing.assert_allclose(assignment.gates, [[0.5, 0.3, 0], [0.7, 0.5, 0]], rtol=1e-5)


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 3, S]))
@settings(max_examples=25, deadline=None)
def test_choice_gates_and_statistics_equal_the_loop(seed, capacity):
    rng = np.random.default_rng(seed)
    x, weights = rng.normal(size=(S, D)), rng.normal(size=(D, E))
    mask = rng.random(S) < 0.8
    routing = routed(np.float32(x), mask, np.float32(weights), PLAIN, capacity)
    p = [[np.exp(r) for r in row] for row in x @ weights]
    p = np.array([[v / sum(row) for v in row] for row in p])
    real = [s for s in range(S) if mask[s]]
    taken = np.zeros((S, E))
    for e in range(E):
        best = sorted(real, key=lambda s, e=e: -p[s, e])[:capacity]
        for c in range(capacity):
            token, gate = routing.assignment.tokens[e, c], routing.assignment.gates[e, c]
            assert token == (best[c] if c < len(best) else S)
            np.testing.assert_allclose(gate, p[best[c], e] if c < len(best) else 0, rtol=1e-4)
        taken[best, e] = 1
    np.testing.assert_allclose(routing.probabilities, p, rtol=1e-4)
    if real:
        values = {name: mean.value() for name, mean in routing.statistics.items()}
        np.testing.assert_allclose(values["load"], taken[real].mean(axis=0), rtol=1e-5)
        np.testing.assert_allclose(
            values["dropped"], np.mean([not taken[s].any() for s in real]), atol=1e-6
        )


@pytest.mark.parametrize("cap", [PLAIN, CAPPED])
def test_contents_of_padding_change_nothing(cap):
    x, weights, mask = vectors(S, D), vectors(D, E, seed=1), np.arange(S) % 3 != 1
    one = routed(x, mask, weights, cap, 3)
    other = routed(x.at[1].set(50.0).at[4].set(-50.0), mask, weights, cap, 3)
    assert not np.isin(one.assignment.tokens, [1, 4, 7]).any()
    for name in ("assignment", "losses", "statistics"):
        jax.tree.map(np.testing.assert_array_equal, getattr(one, name), getattr(other, name))
    np.testing.assert_array_equal(one.probabilities[mask], other.probabilities[mask])


@pytest.mark.parametrize("cap", [PLAIN, CAPPED])
@pytest.mark.parametrize("real", [0, S])
def test_values_and_gradients_are_finite_for_padding_only_and_at_exact_balance(cap, real):
    def total(weights, x):
        routing = routed(x, np.arange(S) < real, weights, cap, 3)
        losses = sum(mean.value() for mean in routing.losses.values())
        return routing.assignment.gates.sum() + losses, routing

    (_, routing), gradients = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(
        jnp.zeros((D, E)), vectors(S, D)
    )
    for leaf in jax.tree.leaves((routing, gradients)):
        assert np.isfinite(leaf).all()
    assert (routing.assignment.tokens == S).all() == (real == 0)


@pytest.mark.parametrize("cap", [PLAIN, CAPPED])
def test_gradient_of_gates_and_loss_equals_finite_differences(cap):
    x, mask, cotangent = vectors(S, D), np.arange(S) != 2, vectors(E * 3, 1, seed=3).reshape(E, 3)

    def value(weights, x):
        routing = routed(x, mask, weights, cap, 3)
        losses = sum(mean.value() for mean in routing.losses.values())
        return (routing.assignment.gates * cotangent).sum() + losses

    check_grads(value, (vectors(D, E, seed=1), x), 1, ["rev"], atol=2e-2, rtol=2e-2)


def test_router_z_loss_by_hand_and_absent_without_coefficient():
    x, weights = vectors(S, D), jnp.zeros((D, E))
    assert not routed(x, np.ones(S, bool), weights, PLAIN, 2).losses
    assert router(PLAIN).loss_coefficients == {}
    # All logits are 0, so that logsumexp is ln 3.
    loss = routed(x, np.ones(S, bool), weights, CAPPED, 2).losses["router_z"]
    np.testing.assert_allclose(loss.value(), np.log(3) ** 2, rtol=1e-5)
    assert router(CAPPED).loss_coefficients == {"router_z": 1e-3}


def test_an_expert_takes_a_token_or_not_by_what_comes_later():
    p = [[0.5, 0.5], [0.4, 0.6], [0.9, 0.1]]
    alone = of_probabilities([*p[:2], [0.1, 0.9]], PLAIN, 1).assignment.tokens
    later = of_probabilities(p, PLAIN, 1).assignment.tokens
    assert alone[0, 0] == 0
    assert later[0, 0] == 2
    assert "other tokens" in ExpertChoice().leak


CONFLICT = [[0.5, 0.4, 0.1], [0.45, 0.15, 0.4], [0.3, 0.35, 0.35]]


def test_the_cap_resolves_a_conflict_by_hand():
    free = of_probabilities(CONFLICT, PLAIN, 1).assignment.tokens
    np.testing.assert_array_equal(free, [[0], [0], [1]])
    # One expert per token: of the six permutations, .5 + .35 + .4 = 1.25 is the largest sum.
    # The next is .45 + .4 + .35 = 1.2.
    capped = of_probabilities(CONFLICT, 1, 1).assignment
    np.testing.assert_array_equal(capped.tokens, [[0], [2], [1]])
    np.testing.assert_allclose(capped.gates, [[0.5], [0.35], [0.4]], rtol=1e-5)


def test_a_cap_of_all_experts_changes_nothing():
    x, weights = vectors(S, D), vectors(D, E, seed=1)
    free = routed(x, np.ones(S, bool), weights, PLAIN, 3).assignment
    capped = routed(x, np.ones(S, bool), weights, E, 3).assignment
    np.testing.assert_array_equal(free.tokens, capped.tokens)


@functools.partial(jax.jit, static_argnums=(2, 3))
def plan(p, mask, capacity, cap):
    return expert_choice.capped_plan(p, mask, capacity, cap)


def linear_program(p, capacity, cap, allowed=None):
    """The maximum and the plan [S, E] without entropy, with exactly full experts."""
    tokens, num_experts = p.shape
    per_expert = np.kron(np.ones((1, tokens)), np.eye(num_experts))
    per_token = np.kron(np.eye(tokens), np.ones((1, num_experts)))
    bounds = [(0, float(a)) for a in (np.ones(p.size) if allowed is None else allowed.ravel())]
    answer = scipy.optimize.linprog(
        -p.ravel(), per_token, np.full(tokens, cap),
        per_expert, np.full(num_experts, capacity), bounds,
    )  # fmt: skip
    return (-answer.fun, answer.x.reshape(p.shape)) if answer.success else (-np.inf, None)


@pytest.mark.parametrize(("capacity", "cap"), [(2, 1), (4, 2)])
def test_the_plan_is_the_linear_programs_where_its_optimum_is_unique(capacity, cap):
    tokens, num_experts, compared = 8, 4, 0
    for seed in range(8):
        rng = np.random.default_rng(seed)
        # Experts of unequal popularity, so that the cap binds.
        logits = rng.normal(size=(tokens, num_experts)) + 2 * rng.normal(size=num_experts)
        p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        best, expected = linear_program(p, capacity, cap)
        runner_up = max(
            linear_program(p, capacity, cap, np.arange(p.size).reshape(p.shape) != index)[0]
            for index in np.flatnonzero(expected > 0.5)
        )
        got = np.asarray(plan(jnp.float32(p), np.ones(tokens, bool), capacity, cap))
        assert (got.sum(axis=1) <= cap + 1e-3).all()
        np.testing.assert_allclose(got.sum(axis=0), capacity, atol=0.1)
        assert (p * got).sum() > best - 0.01 - (capacity - got.sum(axis=0)).clip(0).sum()
        if best - runner_up > 0.02:
            np.testing.assert_allclose(got, expected, atol=0.05)
            taken = of_probabilities(p, cap, capacity).assignment.tokens
            for expert in range(num_experts):
                assert set(taken[expert].tolist()) == set(np.flatnonzero(expected[:, expert] > 0.5))
            free = of_probabilities(p, PLAIN, capacity).assignment.tokens
            compared += not np.array_equal(np.sort(free), np.sort(taken))
    assert compared >= 3, "too few instances with a unique optimum that the cap changes"


def test_the_plan_maximises_with_entropy_by_hand():
    # Token 0 and 1 differ by lambda * ln 3 for the one slot of expert 0: weights 3 : 1.
    p = jnp.array([[0.5 + 1e-3 * np.log(3), 0.1], [0.5, 0.1]], jnp.float32)
    got = plan(p, np.ones(2, bool), 1, 2)
    np.testing.assert_allclose(got, [[0.75, 0.5], [0.25, 0.5]], atol=1e-3)


def test_too_few_real_tokens_for_the_cap_get_their_best_experts_and_leave_slots_empty():
    # Two real tokens, two experts each, four slots: experts 0, 2 and 0, 1 are the largest.
    p = np.array([[0.4, 0.15, 0.35, 0.1], [0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4]])
    mask = [True, True, False]
    got = plan(jnp.float32(p), np.array(mask), 3, 2)
    np.testing.assert_allclose(got, [[1, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]], atol=1e-3)
    tokens = of_probabilities(p, 2, 3, mask).assignment.tokens
    np.testing.assert_array_equal(tokens, [[1, 0, 3], [1, 3, 3], [0, 3, 3], [3, 3, 3]])


@pytest.mark.parametrize("fields", [{"cap": -1}, {"router_z_weight": -0.1}])
def test_bad_fields_are_named(fields):
    with pytest.raises(UserError, match=next(iter(fields))):
        ExpertChoice(**fields).validate(E)
    ExpertChoice().validate(E)


def test_the_shift_is_found_in_at_most_as_many_rounds_as_there_are_terms():
    """Rounding once made terms jump to and fro; equal and huge logarithms are the hard ones."""
    generator = np.random.default_rng(0)
    for size in (1e-6, 1.0, 1e3, 1e5):
        logs = jnp.asarray(
            size * generator.choice([0.0, 0.5, 1.0, 1.0 + 1e-7], (64, 16)), jnp.float32
        )
        for total in (1, 3, 15, 16):
            shift = np.asarray(jax.jit(expert_choice._shift_to_total)(logs, total), np.float64)
            reached = np.minimum(1, np.exp(np.asarray(logs, np.float64) + shift[:, None])).sum(
                axis=1
            )
            # Shifts of 1e5 are rounded to 0.004.
            np.testing.assert_allclose(reached, total, rtol=1e-3 + 1e-6 * size)
