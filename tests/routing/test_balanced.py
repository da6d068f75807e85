import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe_jax.errors import UserError
from moe_jax.routing.balanced import BASE, Solver, auction, sinkhorn
from tests.routing.inputs import group, vectors

S, E, D = 12, 3, 5
SOLVERS = [BASE(), BASE(Solver.SINKHORN)]

jitted_auction = jax.jit(auction, static_argnames=("per_expert", "max_rounds"))
jitted_sinkhorn = jax.jit(sinkhorn, static_argnames="iterations")


@functools.cache
def jitted_route(solver, train, capacity=S, num_experts=E):
    """(weights, x, mask) -> Routing."""

    def route(weights, x, mask):
        inputs = group(x, mask=mask, train=train)
        return BASE(solver).route({"weights": weights}, inputs, num_experts, capacity)

    return jax.jit(route)


def weights_of(seed=1, scale=1.0):
    return scale * jax.random.normal(jax.random.key(seed), (D, E))


def best_total(scores, per_expert):
    """The optimum by SciPy, on a matrix with one column per place."""
    places = np.repeat(np.asarray(scores, np.float64), per_expert, axis=1)
    rows, columns = scipy.optimize.linear_sum_assignment(places, maximize=True)
    return places[rows, columns].sum()


def total(scores, experts):
    return np.asarray(scores, np.float64)[np.arange(len(scores)), experts].sum()


def scores_of(kind, shape, scale, seed):
    rng = np.random.default_rng(seed)
    tokens, experts = shape
    normal = rng.normal(size=shape)
    kinds = {
        "normal": normal,
        "equal": np.ones(shape),
        "one expert": np.eye(experts)[[0] * tokens],
        "one expert, then another": -np.arange(experts) + 0 * normal,
        "integers": rng.integers(-2, 3, size=shape),
        "pairs of like tokens": normal[np.arange(tokens) // 2],
        "huge ranges": np.sign(normal) * 10 ** (3 * np.abs(normal)),
        "far from 0": normal + 100 * rng.normal(size=(tokens, 1)),
    }
    return (scale * kinds[kind]).astype(np.float32)


KINDS = st.sampled_from(
    [
        "normal",
        "equal",
        "one expert",
        "one expert, then another",
        "integers",
        "pairs of like tokens",
        "huge ranges",
        "far from 0",
    ]
)
# Few shapes, because each is compiled once: S = E places, S not divisible by E, E = 1, S < E.
SHAPES = st.sampled_from([(6, 3), (10, 4), (5, 2), (4, 1), (3, 5)])


@given(
    KINDS,
    SHAPES,
    st.lists(st.booleans(), min_size=10, max_size=10),
    st.sampled_from([1e-6, 1.0, 1e6]),
    st.sampled_from([0.3, 0.01, 0.001]),
    st.integers(0, 1000),
)
@example("equal", (6, 3), [True] * 10, 1.0, 0.001, 0)
@example("one expert", (10, 4), [True] * 10, 1e6, 0.001, 0)
@example("huge ranges", (10, 4), [True] * 10, 1e6, 0.001, 0)
@example("normal", (10, 4), [False] * 10, 1.0, 0.01, 0)
@settings(max_examples=30, deadline=None)
def test_the_auction_is_balanced_and_within_epsilon_of_the_optimum(
    kind, shape, mask, scale, epsilon, seed
):
    tokens, num_experts = shape
    scores, mask = scores_of(kind, shape, scale, seed), np.array(mask[:tokens])
    per_expert = -(-tokens // num_experts)
    spread = max(np.ptp(scores, axis=1).max(), 1e-6)
    experts = np.asarray(jitted_auction(scores, mask, per_expert, epsilon * spread, 10_000))
    assert (experts[~mask] == num_experts).all()
    assert np.bincount(experts[mask], minlength=num_experts).max() <= per_expert
    assert (experts[mask] < num_experts).all()
    if not mask.any():
        return
    gap = best_total(scores[mask], per_expert) - total(scores[mask], experts[mask])
    rounding = 1e-5 * np.abs(scores).max() * tokens
    assert -rounding <= gap <= mask.sum() * epsilon * spread + rounding
    # Left-overs of an auction that was broken off take what is left.
    hasty = np.asarray(jitted_auction(scores, mask, per_expert, epsilon * spread, 1))
    assert np.bincount(hasty[mask], minlength=num_experts + 1)[-1] == 0
    assert np.bincount(hasty[mask], minlength=num_experts).max() <= per_expert


def test_the_auction_gives_up_a_token_s_best_expert_for_the_total():
    # One place each. The six totals are 11 (1, 0, 2), 8 (0, 1, 2), 8 (0, 2, 1), 7 (1, 2, 0),
    # 8 (2, 0, 1) and 4 (2, 1, 0), so token 0 has to leave its best expert to token 1.
    scores = np.array([[5, 4, 0], [5, 1, 0], [3, 3, 2]], np.float32)
    totals = [total(scores, p) for p in itertools.permutations(range(3))]
    assert sorted(totals) == [4, 7, 8, 8, 8, 11]
    experts = jitted_auction(scores, np.ones(3, bool), 1, 0.1, 100)
    np.testing.assert_array_equal(experts, [1, 0, 2])
    # Two places each: token 2 is worth 3 to expert 1, too, and leaves expert 0 to the others.
    np.testing.assert_array_equal(jitted_auction(scores, np.ones(3, bool), 2, 0.1, 100), [0, 0, 1])
    # A token that is not there takes no place.
    mask = np.array([True, False, True])
    np.testing.assert_array_equal(jitted_auction(scores, mask, 1, 0.1, 100), [0, 3, 1])


def test_raises_end_a_tie_of_bidders():
    # Tokens 0 and 2 tie for expert 0. Without a raise both would offer 0 for ever, and token 2 would
    # end with expert 2, for 5 in all; 8 is best.
    scores = np.array([[3, 0, 3], [2, 2, 0], [3, 3, 0]], np.float32)
    assert total(scores, jitted_auction(scores, np.ones(3, bool), 1, 0.1, 100)) == 8
    assert total(scores, jitted_auction(scores, np.ones(3, bool), 1, 0.0, 100)) == 5


def test_a_broken_off_auction_fills_up_left_to_right():
    # The first round gives expert 0 to the two highest offers (9 - 0, 8 - 0); the others take the
    # better of experts 1 and 2 while there is room.
    scores = np.array([[5, 1, 0], [9, 0, 0], [4, 3, 0], [8, 0, 0], [7, 2, 0]], np.float32)
    experts = jitted_auction(scores, np.ones(5, bool), 2, 0.1, 1)
    np.testing.assert_array_equal(experts, [1, 0, 1, 0, 2])


def test_what_is_added_to_all_scores_of_a_token_changes_nothing():
    scores = scores_of("normal", (10, 4), 1.0, 3)
    shift = np.float32(2.0 ** np.arange(10))[:, None]
    ones = np.ones(10, bool)
    np.testing.assert_array_equal(
        jitted_auction(np.round(scores * 64) / 64 + shift, ones, 3, 0.01, 1000),
        jitted_auction(np.round(scores * 64) / 64, ones, 3, 0.01, 1000),
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_diverged_model_s_auction_ends_and_is_balanced(value):
    for part in (np.s_[:], np.s_[0], np.s_[:, 0], np.s_[1, 1]):
        scores = scores_of("normal", (10, 4), 1.0, 0)
        scores[part] = value
        experts = jitted_auction(scores, np.ones(10, bool), 3, 0.01, 50)
        counts = np.bincount(experts, minlength=5)
        assert counts.max() <= 3
        assert counts[4] == 0


def test_too_few_places_are_refused():
    with pytest.raises(ValueError, match="2 \\* 1 places for 3 tokens"):
        auction(jnp.zeros((3, 2)), jnp.ones(3, bool), 1, 0.1, 10)


def sinkhorn_by_hand(scores, iterations):
    """exp(scores), columns scaled to S / E and rows to 1 in turn, in float64."""
    plan = [[math.exp(value) for value in row] for row in np.asarray(scores, np.float64)]
    for row in plan:
        row[:] = [value / sum(row) for value in row]
    for _ in range(iterations):
        for e in range(len(plan[0])):
            column = sum(row[e] for row in plan)
            for row in plan:
                row[e] *= len(plan) / len(plan[0]) / column
        for row in plan:
            row[:] = [value / sum(row) for value in row]
    return np.array(plan)


@given(st.integers(0, 100), st.sampled_from([1, 3, 20]), st.sampled_from([0.1, 1.0, 5.0]))
@settings(max_examples=20, deadline=None)
def test_sinkhorn_equals_the_loops_and_leaves_out_padding(seed, iterations, scale):
    rng = np.random.default_rng(seed)
    scores, mask = rng.normal(size=(10, 4)).astype(np.float32) * scale, rng.random(10) < 0.7
    mask[0] = True
    plan = np.asarray(jitted_sinkhorn(scores, mask, iterations))
    expected = sinkhorn_by_hand(scores[mask], iterations)
    np.testing.assert_allclose(plan[mask], expected, rtol=2e-4, atol=1e-6)
    assert (plan[~mask] == 0).all()


def test_sinkhorn_by_hand():
    # Scaling keeps the cross ratio a d / (b c) = 3, and a balanced 2 x 2 plan is [[p, q], [q, p]]
    # with p + q = 1: p / q = sqrt(3), p = 0.6339746. The third token is padding.
    scores = np.log(np.array([[1, 1], [1, 3], [50, 1]], np.float32))
    plan = jitted_sinkhorn(scores, np.array([True, True, False]), 50)
    p, q = 0.6339746, 0.3660254
    np.testing.assert_allclose(plan, [[p, q], [q, p], [0, 0]], atol=1e-5)
    # Equal scores: 3 tokens over 2 experts, 1.5 each.
    np.testing.assert_allclose(
        jitted_sinkhorn(np.zeros((3, 2), np.float32), np.ones(3, bool), 1), np.full((3, 2), 0.5)
    )


def test_sinkhorn_is_finite_for_large_scores_and_for_padding_only():
    scores = scores_of("normal", (10, 4), 1e4, 0)
    plan = np.asarray(jitted_sinkhorn(scores, np.ones(10, bool), 20))
    np.testing.assert_allclose(plan.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(jitted_sinkhorn(scores, np.zeros(10, bool), 20), 0)


def test_sinkhorn_spreads_tokens_that_all_prefer_one_expert():
    # All prefer expert 0 by 4, and each its own expert by 2 over the third.
    own = np.arange(12) % 3
    scores = 4 * np.eye(3)[[0] * 12] + 2 * np.eye(3)[own]
    plan = np.asarray(jitted_sinkhorn(scores.astype(np.float32), np.ones(12, bool), 20))
    np.testing.assert_allclose(plan.sum(axis=0), 4, rtol=1e-3)
    np.testing.assert_array_equal(plan.argmax(axis=1), own)


@pytest.mark.parametrize("solver", Solver)
def test_evaluation_is_greedy_and_gates_are_sigmoids(solver):
    # Scores are 0, ln 3 and -ln 3 in some order: gates are 3/4 for the best.
    x = jnp.eye(3, D)
    weights = (
        jnp.zeros((D, 3))
        .at[:3]
        .set(math.log(3) * jnp.array([[0.0, 1, -1], [1, 0, -1], [-1, 1, 0]]))
    )
    routing = jitted_route(solver, False, capacity=1)(weights, x, jnp.ones(3, bool))
    np.testing.assert_array_equal(routing.assignment.experts, [[1], [0], [1]])
    np.testing.assert_array_equal(routing.assignment.position_in_expert, [[0], [0], [1]])
    np.testing.assert_allclose(routing.assignment.gates, np.full((3, 1), 0.75), rtol=1e-6)
    # exp(scores) are 1, 3 and 1/3, over 13/3: 3/13, 9/13 and 1/13.
    np.testing.assert_allclose(routing.probabilities[0], np.array([3, 9, 1]) / 13, rtol=1e-6)
    p = np.array([3, 9, 1]) / 13
    values = {name: mean.value() for name, mean in routing.statistics.items()}
    np.testing.assert_allclose(values["entropy"], -(p * np.log(p)).sum(), rtol=1e-5)
    np.testing.assert_allclose(values["logsumexp_squared"], math.log(13 / 3) ** 2, rtol=1e-5)
    np.testing.assert_allclose(values["load"], [1 / 3, 2 / 3, 0], rtol=1e-6)
    np.testing.assert_allclose(values["dropped"], 1 / 3, rtol=1e-6)


def test_training_gives_up_the_best_expert_and_gates_with_the_chosen_one():
    # As above, one token per expert (S = E = 3): tokens 0 and 2 both want expert 1, where token 0
    # scores 2 and token 2 scores 1; expert 2 is left, worth 0 to token 0 and 1/2 to token 2.
    weights = jnp.zeros((D, 3)).at[:3].set(jnp.array([[1.0, 2, 0], [3, 0, 0], [0, 1, 0.5]]))
    for solver in Solver:
        routing = jitted_route(solver, True, capacity=1)(weights, jnp.eye(3, D), jnp.ones(3, bool))
        np.testing.assert_array_equal(routing.assignment.experts, [[1], [0], [2]])
        expected = [[1 / (1 + math.exp(-score))] for score in (2, 3, 0.5)]
        np.testing.assert_allclose(routing.assignment.gates, expected, rtol=1e-6)
        assert routing.statistics["dropped"].value() == 0


@pytest.mark.parametrize("scale", [0.0, 0.02, 30.0])
def test_training_gives_every_expert_as_many_tokens(scale):
    x = vectors(S, D) + 1.0  # A common part makes one expert the favourite.
    mask = jnp.ones(S, bool)
    routing = jitted_route(Solver.AUCTION, True, capacity=S // E)(weights_of(scale=scale), x, mask)
    np.testing.assert_array_equal(np.bincount(routing.assignment.experts[:, 0]), [4, 4, 4])
    assert routing.statistics["dropped"].value() == 0
    if scale:
        greedy = jitted_route(Solver.AUCTION, False)(weights_of(scale=scale), x, mask)
        assert np.bincount(greedy.assignment.experts[:, 0]).max() > 4


def test_the_router_s_total_is_within_its_epsilon_of_the_optimum():
    for seed in range(5):
        x, weights = vectors(S, D, seed), weights_of(seed)
        scores = np.asarray(x, np.float64) @ np.asarray(weights, np.float64)
        routing = jitted_route(Solver.AUCTION, True)(weights, x, jnp.ones(S, bool))
        gap = best_total(scores, S // E) - total(scores, routing.assignment.experts[:, 0])
        assert gap <= S * BASE().auction_epsilon * np.ptp(scores, axis=1).max() + 1e-4


@pytest.mark.parametrize("solver", Solver)
@pytest.mark.parametrize("train", [True, False])
def test_gradients_go_through_the_gate_alone(solver, train):
    x, mask, weights = vectors(S, D), jnp.arange(S) != 4, weights_of()
    cotangent = jax.random.normal(jax.random.key(5), (S, 1))
    route = jitted_route(solver, train)

    def loss(weights):
        assignment = route(weights, x, mask).assignment
        return (assignment.gates * cotangent * (assignment.position_in_expert < S)).sum()

    gradient = np.asarray(jax.grad(loss)(weights))
    chosen = np.asarray(route(weights, x, mask).assignment.experts)[:, 0]
    expected = np.zeros((D, E))  # d sigmoid(s) = sigmoid(s) (1 - sigmoid(s)).
    for t in range(S):
        if mask[t]:
            score = float(x[t] @ weights[:, chosen[t]])
            slope = 1 / (1 + math.exp(-score)) / (1 + math.exp(score))
            expected[:, chosen[t]] += float(cotangent[t, 0]) * slope * np.asarray(x[t])
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)
    step = 1e-2 * jax.random.normal(jax.random.key(6), weights.shape)
    above, below = (route(weights + sign * step, x, mask).assignment.experts for sign in (1, -1))
    np.testing.assert_array_equal(above, below)  # Else the difference is none of the gradient.
    np.testing.assert_allclose(
        loss(weights + step) - loss(weights - step), 2 * (gradient * step).sum(), rtol=1e-2
    )


@pytest.mark.parametrize("solver", Solver)
@pytest.mark.parametrize("train", [True, False])
def test_gradients_are_finite_at_exact_balance_and_for_padding(solver, train):
    route = jitted_route(solver, train)

    def loss(weights, x, mask):
        routing = route(weights, x, mask)
        return routing.assignment.gates.sum() + sum(
            mean.value().sum() for mean in routing.statistics.values()
        )

    for weights in (jnp.zeros((D, E)), weights_of()):
        for mask in (jnp.ones(S, bool), jnp.zeros(S, bool)):
            gradients = jax.grad(loss, argnums=(0, 1))(weights, vectors(S, D), mask)
            assert all(jnp.isfinite(leaf).all() for leaf in gradients)


@pytest.mark.parametrize("router", SOLVERS, ids=repr)
def test_groups_under_jit_and_vmap_equal_single_groups(router):
    route = jitted_route(router.solver, True, capacity=4)
    masks = jnp.stack([jnp.ones(S, bool), jnp.zeros(S, bool), jnp.arange(S) % 3 != 1])
    xs = jnp.stack([vectors(S, D, seed) for seed in range(3)])
    lifted = jax.jit(jax.vmap(route, in_axes=(None, 0, 0)))(weights_of(), xs, masks)
    for leaf in jax.tree.leaves(lifted):
        assert jnp.isfinite(leaf).all()
        assert leaf.dtype in (jnp.int32, jnp.float32)
    for g in range(3):
        jax.tree.map(
            lambda got, expected, g=g: np.testing.assert_allclose(
                got[g], expected, rtol=1e-4, atol=1e-5
            ),
            lifted,
            route(weights_of(), xs[g], masks[g]),
        )
    assert (lifted.assignment.position_in_expert[~masks] == 4).all(), "padding took a slot"
    assert all((mean.count[1] == 0).all() for mean in lifted.statistics.values())


@pytest.mark.parametrize("solver", Solver)
@pytest.mark.parametrize("train", [True, False])
def test_the_contents_of_padding_change_nothing(solver, train):
    route = jitted_route(solver, train, capacity=4)
    x, mask = vectors(S, D), jnp.arange(S) % 4 != 1
    before = route(weights_of(), x, mask)
    after = route(weights_of(), jnp.where(mask[:, None], x, 1e3), mask)
    for name in ("experts", "position_in_expert", "gates"):
        np.testing.assert_array_equal(
            getattr(before.assignment, name)[mask], getattr(after.assignment, name)[mask]
        )
    jax.tree.map(np.testing.assert_array_equal, before.statistics, after.statistics)


@pytest.mark.parametrize("solver", Solver)
def test_training_leaks_and_evaluation_does_not(solver):
    x, mask = vectors(S, D), jnp.ones(S, bool)
    first, later = slice(0, S // 2), slice(S // 2, S)
    for train in (True, False):
        before, after = (
            jitted_route(solver, train)(weights_of(), value, mask).assignment.experts[first]
            for value in (x.at[later].set(3 * x[0]), x.at[later].set(-3 * x[0]))
        )
        assert (before != after).any() == train
    assert "later tokens" in BASE(solver).leak


def test_scores_are_float32_under_bfloat16():
    x, mask = vectors(S, D).astype(jnp.bfloat16), jnp.ones(S, bool)
    route = jitted_route(Solver.AUCTION, True)
    jax.tree.map(
        np.testing.assert_array_equal,
        route(weights_of(), x, mask),
        route(weights_of(), x.astype(jnp.float32), mask),
    )


def test_weights_start_normal():
    weights = BASE().init(jax.random.key(0), 100, 40)["weights"]
    assert weights.shape == (100, 40)
    np.testing.assert_allclose(weights.std(), 0.02, rtol=0.1)


@pytest.mark.parametrize(
    ("router", "message"),
    [
        (BASE(auction_epsilon=0.0), "router.auction_epsilon is 0.0"),
        (BASE(auction_epsilon=math.nan), "router.auction_epsilon is nan"),
        (BASE(init_deviation=math.nan), "router.init_deviation is nan"),
        (BASE(auction_rounds=0), "router.auction_rounds is 0"),
        (BASE(sinkhorn_iterations=0), "router.sinkhorn_iterations is 0"),
    ],
)
def test_fields_out_of_range_are_named(router, message):
    BASE().validate(E)
    with pytest.raises(UserError, match=message) as error:
        router.validate(E)
    assert str(error.value).endswith(".")
