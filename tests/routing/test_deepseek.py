import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from moe_jax.errors import UserError
from moe_jax.routing import losses
from moe_jax.routing.deepseek import DeepSeekV2, DeepSeekV3, within_best_groups
from moe_jax.routing.losses import Losses
from moe_jax.routing.scores import Exploration
from moe_jax.routing.token_choice import TopK
from tests.routing.inputs import group, vectors

S, D, E = 9, 5, 8
V2_LOSSES = Losses(
    expert_level=0.003, device_level=0.05, communication=0.02, devices=4, devices_per_token=2
)
V2 = DeepSeekV2(k=3, losses=V2_LOSSES)
V3 = DeepSeekV3(k=3, groups=4, groups_per_token=2)
ROUTERS = [pytest.param(V2, id="V2"), pytest.param(V3, id="V3")]


def random_parameters(router, seed=3, bias=0.0):
    """Weights of deviation 1; the V3 bias is normal with deviation `bias`."""
    keys = jax.random.split(jax.random.key(seed))
    state = router.init_state(E)
    return {"weights": jax.random.normal(keys[0], (D, E))} | {
        name: bias * jax.random.normal(keys[1], value.shape) for name, value in state.items()
    }


def jitted_route(router, num_experts=E, capacity=S):
    def route(parameters, inputs):
        return router.route(parameters, inputs, num_experts, capacity)

    return jax.jit(route)


def jitted_choice(router, num_experts):
    return jax.jit(lambda parameters, inputs: router.choose(parameters, inputs, num_experts))


v2_route, v3_route = jitted_route(V2), jitted_route(V3)


def logit(probability):
    return math.log(probability / (1 - probability))


# Slow references, from the papers' formulas.


def chosen_by_loop(row, k, groups, groups_per_token, counted):
    """The K best of the M best groups of one token's ranking, best first."""
    size = len(row) // groups
    score = [
        sum(sorted(row[g * size : (g + 1) * size], reverse=True)[:counted]) for g in range(groups)
    ]
    best = sorted(range(groups), key=lambda g: -score[g])[:groups_per_token]
    reachable = [e for e in range(len(row)) if e // size in best]
    return sorted(reachable, key=lambda e: -row[e])[:k]


def sigmoid(logits):
    return 1 / (1 + np.exp(-np.float64(logits)))


def logits_of(parameters, x):
    return np.float64(x) @ np.float64(parameters["weights"])


def sequence_wise_by_loop(scores, k, mask, sequence_ids):
    """Equations 17-20 of V3: mean over sequences of sum_i f_i P_i."""
    values = []
    for sequence in sorted(set(sequence_ids)):
        tokens = [s for s in range(len(scores)) if sequence_ids[s] == sequence and mask[s]]
        if not tokens:
            continue
        total = 0.0
        for i in range(scores.shape[1]):
            picked = sum(i in np.argsort(-scores[s], kind="stable")[:k] for s in tokens)
            f = scores.shape[1] / (k * len(tokens)) * picked
            total += f * sum(scores[s, i] / scores[s].sum() for s in tokens) / len(tokens)
        values.append(total)
    return sum(values) / len(values)


# Worked out by hand.


def test_v2_by_hand():
    # Three devices of two experts, M = 2, K = 3; each token's best affinity per device:
    #   .30 .04  .06 .25  .20 .15   .30 .25 .20 -> devices 0 1 -> experts 0 3 2 (plain: 0 3 4)
    #   .28 .26  .05 .06  .25 .10   .28 .06 .25 -> devices 0 2 -> experts 0 1 4
    #   .32 .11  .30 .09  .08 .10   .32 .30 .10 -> devices 0 1 -> experts 0 2 1
    probabilities = jnp.array(
        [
            [0.30, 0.04, 0.06, 0.25, 0.20, 0.15],
            [0.28, 0.26, 0.05, 0.06, 0.25, 0.10],
            [0.32, 0.11, 0.30, 0.09, 0.08, 0.10],
        ]
    )
    router = DeepSeekV2(k=3, losses=dataclasses.replace(V2_LOSSES, devices=3))
    routing = jitted_route(router, 6, 3)({"weights": jnp.log(probabilities)}, group(jnp.eye(3)))
    np.testing.assert_array_equal(routing.assignment.experts, [[0, 3, 2], [0, 1, 4], [0, 2, 1]])
    # 16 times the affinities, not renormalised.
    np.testing.assert_allclose(
        routing.assignment.gates,
        [[4.8, 4.0, 0.96], [4.48, 4.16, 4.0], [5.12, 4.8, 1.76]],
        rtol=1e-5,
    )
    # Counts 3 2 2 1 1 0, f = 6 / 9 of them; 3 P = .90 .41 .41 .40 .53 .35.
    #   expert level (6 * .90 + 4 * .41 + 4 * .41 + 2 * .40 + 2 * .53) / 9 = 10.54 / 9
    #   device level f' = 5/3 1 1/3, 3 P' = 1.31 .81 .88: (6.55 + 2.43 + .88) / 9 = 9.86 / 9
    #   sent to devices 3 2 1, f'' = 3 / (2 * 3) of them: (3.93 + 1.62 + .88) / 6 = 6.43 / 6
    values = {name: float(loss.value()) for name, loss in routing.losses.items()}
    assert values == pytest.approx(
        {"expert_level": 10.54 / 9, "device_level": 9.86 / 9, "communication": 6.43 / 6}, rel=1e-5
    )


@pytest.mark.parametrize(
    ("bias", "experts", "gates"),
    [
        # s = .8 .1 | .5 .6: group sums .9 < 1.1, although the largest score is in the first group.
        pytest.param([0, 0, 0, 0], [3, 2], [2.5 * 0.6 / 1.1, 2.5 * 0.5 / 1.1], id="no bias"),
        # .8 .4 | .5 .6: sums 1.2 > 1.1; the gates are of s without the bias: .8 and .1 over .9.
        pytest.param([0, 0.3, 0, 0], [0, 1], [2.5 * 8 / 9, 2.5 / 9], id="bias"),
        # .8 1.1 | .5 .6: the bias turns the order of the choices round.
        pytest.param([0, 1, 0, 0], [1, 0], [2.5 / 9, 2.5 * 8 / 9], id="large bias"),
    ],
)
def test_v3_by_hand(bias, experts, gates):
    weights = jnp.array([[logit(s) for s in (0.8, 0.1, 0.5, 0.6)]])
    router = DeepSeekV3(k=2, groups=2, groups_per_token=1)
    routing = jitted_route(router, 4, 1)(
        {"weights": weights, "bias": jnp.array(bias, jnp.float32)}, group(jnp.ones((1, 1)))
    )
    np.testing.assert_array_equal(routing.assignment.experts, [experts])
    np.testing.assert_allclose(routing.assignment.gates, [gates], rtol=1e-5)
    np.testing.assert_allclose(routing.probabilities, [[0.4, 0.05, 0.25, 0.3]], rtol=1e-5)


def test_without_renormalisation_the_gates_are_the_scores():
    # Loss-free balancing: s = .8 .1 .5 .6, the bias lifts .1 over .6; gates .8 and .1, not 8/9 and 1/9.
    weights = jnp.array([[logit(s) for s in (0.8, 0.1, 0.5, 0.6)]])
    router = DeepSeekV3(k=2, groups=1, groups_per_token=1, renormalize=False, gate_scale=1.0)
    routing = jitted_route(router, 4, 1)(
        {"weights": weights, "bias": jnp.array([0, 0.6, 0, 0])}, group(jnp.ones((1, 1)))
    )
    np.testing.assert_array_equal(routing.assignment.experts, [[0, 1]])
    np.testing.assert_allclose(routing.assignment.gates, [[0.8, 0.1]], rtol=1e-5)


def test_v3_sequence_wise_loss_by_hand():
    # K = 1, a bias that sends everything to expert 2. Scores, over their sums:
    #   .9 .3 .6   1/2 1/6 1/3
    #   .2 .6 .2   .2 .6 .2
    #   .4 .2 .2   1/2 1/4 1/4
    # The largest scores are those of experts 0 1 0: f = 3 / (1 * 3) * (2 1 0),
    # 3 P = 1.2, 1.01666667: (2 * 1.2 + 1.01666667) / 3 = 1.13888889.
    scores = [[0.9, 0.3, 0.6], [0.2, 0.6, 0.2], [0.4, 0.2, 0.2]]
    weights = jnp.array([[logit(s) for s in row] for row in scores])
    router = DeepSeekV3(k=1, groups=1, groups_per_token=1)
    routing = jitted_route(router, 3, 3)(
        {"weights": weights, "bias": jnp.array([0.0, 0, 1])}, group(jnp.eye(3))
    )
    np.testing.assert_array_equal(routing.assignment.experts, [[2], [2], [2]])
    np.testing.assert_allclose(routing.losses["sequence_wise"].value(), 41 / 36, rtol=1e-5)


def test_bias_rises_under_and_falls_over_the_mean_load():
    # Mean load (1 + .5 + .25 + .25) / 4 = .5: over, at, under, under.
    state = {"bias": jnp.array([0.0, 0.2, -0.1, 0.0])}
    statistics = {"load": jnp.array([1.0, 0.5, 0.25, 0.25]), "dropped": jnp.array(0.0)}
    after = V3.next_state(state, statistics)
    assert set(after) == {"bias"}
    np.testing.assert_allclose(after["bias"], [-0.001, 0.2, -0.099, 0.001], rtol=1e-6)
    faster = dataclasses.replace(V3, bias_rate=0.5).next_state(state, statistics)
    np.testing.assert_allclose(faster["bias"], [-0.5, 0.2, 0.4, 0.5], rtol=1e-6)


def test_bias_stays_at_balance_and_without_a_rate():
    state = {"bias": jnp.array([0.3, -0.3])}
    for router, load in [
        (V3, jnp.array([0.5, 0.5])),
        (V3, jnp.zeros(2)),  # A batch of padding.
        (dataclasses.replace(V3, bias_rate=0.0), jnp.array([1.0, 0.0])),
    ]:
        np.testing.assert_array_equal(
            router.next_state(state, {"load": load})["bias"], state["bias"]
        )


def test_a_load_of_exactly_the_mean_moves_no_bias():
    # Counts 29 of 232 tokens in 8 experts: the float32 mean of the loads is not the load of 29.
    counts = np.array([29, 29, 28, 30, 10, 48, 29, 29])
    assert counts.mean() == 29
    load = jnp.asarray(counts / 232, jnp.float32)
    bias = V3.next_state({"bias": jnp.zeros(8)}, {"load": load})["bias"]
    np.testing.assert_array_equal(np.sign(bias), np.sign(29 - counts))


# Against the loops.

masks = st.lists(st.booleans(), min_size=S, max_size=S).filter(any)


@given(st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_v2_selection_equals_the_loop(seed):
    parameters, x = random_parameters(V2, seed), vectors(S, D, seed)
    logits = logits_of(parameters, x)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assignment = v2_route(parameters, group(x)).assignment
    expected = np.array([chosen_by_loop(row, 3, 4, 2, counted=1) for row in p])
    np.testing.assert_array_equal(assignment.experts, expected)
    np.testing.assert_allclose(
        assignment.gates, 16 * np.take_along_axis(p, expected, axis=1), rtol=1e-4
    )


@given(st.integers(0, 1000), st.sampled_from([0.0, 0.1, 1.0]), masks)
@settings(max_examples=25, deadline=None)
def test_v3_equals_the_loop(seed, bias, mask):
    parameters, x = random_parameters(V3, seed, bias), vectors(S, D, seed)
    s = sigmoid(logits_of(parameters, x))
    sequences = [0] * 4 + [1] * 5
    routing = v3_route(parameters, group(x, mask=mask, sequence_ids=sequences))
    ranking = s + np.float64(parameters["bias"])
    expected = np.array([chosen_by_loop(row, 3, 4, 2, counted=2) for row in ranking])
    np.testing.assert_array_equal(routing.assignment.experts, expected)
    chosen = np.take_along_axis(s, expected, axis=1)
    np.testing.assert_allclose(
        routing.assignment.gates, 2.5 * chosen / chosen.sum(axis=1, keepdims=True), rtol=1e-4
    )
    np.testing.assert_allclose(
        routing.losses["sequence_wise"].value(),
        sequence_wise_by_loop(s, 3, mask, sequences),
        rtol=1e-4,
    )


def test_a_group_of_one_expert_is_ranked_by_it():
    router = DeepSeekV3(k=3, groups=E, groups_per_token=4)
    parameters, x = random_parameters(router, bias=0.3), vectors(S, D)
    ranking = sigmoid(logits_of(parameters, x)) + np.float64(parameters["bias"])
    experts = jitted_route(router)(parameters, group(x)).assignment.experts
    np.testing.assert_array_equal(experts, np.argsort(-ranking, axis=1)[:, :3])


def test_equal_rankings_leave_the_first_groups():
    limited = within_best_groups(jnp.zeros((1, 6)), groups=3, groups_per_token=2, counted=1)
    np.testing.assert_array_equal(limited, [[0, 0, 0, 0, -np.inf, -np.inf]])


# What the papers say.


@given(st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_v2_tokens_lie_on_at_most_m_devices(seed):
    parameters, x = random_parameters(V2, seed), vectors(S, D, seed)
    experts = np.asarray(v2_route(parameters, group(x)).assignment.experts)
    assert all(len(set(row // (E // 4))) <= 2 for row in experts)
    assert all(len(set(row)) == 3 for row in experts)


@given(st.integers(0, 1000), st.sampled_from([1.0, 30.0]))
@settings(max_examples=20, deadline=None)
def test_v3_gates_sum_to_the_scale_in_at_most_m_groups(seed, scale):
    parameters, x = random_parameters(V3, seed, bias=0.5), vectors(S, D, seed)
    routing = v3_route(parameters | {"weights": scale * parameters["weights"]}, group(x))
    experts = np.asarray(routing.assignment.experts)
    assert all(len(set(row // (E // 4))) <= 2 for row in experts)
    np.testing.assert_allclose(routing.probabilities.sum(axis=1), 1, rtol=1e-5)
    # The floor of the sum is felt only where the bias chose experts of less than 1e-9.
    felt = np.take_along_axis(np.asarray(routing.probabilities), experts, 1).sum(axis=1) < 1e-8
    np.testing.assert_allclose(routing.assignment.gates.sum(axis=1)[~felt], 2.5, rtol=1e-5)


def test_v3_gates_sum_to_the_scale_where_every_sigmoid_underflows():
    parameters = {"weights": -200.0 - jnp.arange(E, dtype=jnp.float32)[None], "bias": jnp.zeros(E)}
    routing = v3_route(parameters, group(jnp.ones((S, 1))))
    np.testing.assert_allclose(routing.assignment.gates.sum(axis=1), 2.5, rtol=1e-5)
    np.testing.assert_allclose(
        routing.probabilities[0], jax.nn.softmax(-jnp.arange(E, dtype=jnp.float32)), rtol=1e-4
    )


def test_v3_is_finite_where_the_bias_chooses_experts_whose_scores_vanish():
    weights = jnp.array([[0.0, 0, 0, 0, -200, -200, -200, -200]])
    bias = jnp.array([0.0, 0, 0, 0, 5, 5, 5, 5])
    inputs = group(jnp.ones((S, 1)))

    @jax.jit
    @jax.value_and_grad
    def first_gate(weights):
        return V3.route({"weights": weights, "bias": bias}, inputs, E, S).assignment.gates[0, 0]

    gate, gradient = first_gate(weights)
    # Three chosen experts of equal score, be it as small as e^-200.
    assert float(gate) == pytest.approx(2.5 / 3, rel=1e-5)
    assert np.isfinite(gradient).all()


def test_all_devices_allowed_is_plain_top_k():
    limits = dataclasses.replace(V2_LOSSES, devices_per_token=4)
    parameters, inputs = random_parameters(V2), group(vectors(S, D))
    got = jitted_route(DeepSeekV2(k=3, losses=limits))(parameters, inputs)
    expected = jitted_route(TopK(k=3, losses=limits, gate_scale=16.0))(parameters, inputs)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_one_group_limits_nothing():
    router = DeepSeekV3(k=3, groups=1, groups_per_token=1)
    parameters, x = random_parameters(router, bias=0.3), vectors(S, D)
    ranking = sigmoid(logits_of(parameters, x)) + np.float64(parameters["bias"])
    experts = jitted_route(router)(parameters, group(x)).assignment.experts
    np.testing.assert_array_equal(experts, np.argsort(-ranking, axis=1)[:, :3])


def test_bias_updates_even_out_a_skewed_load():
    router = DeepSeekV3(k=2, groups=1, groups_per_token=1, bias_rate=0.01)
    x = vectors(16, D)
    # All tokens lean to the first experts.
    weights = 0.5 * random_parameters(router)["weights"]
    inputs = group(jnp.concatenate([x, jnp.ones((16, 1))], axis=1))
    weights = jnp.concatenate([weights, jnp.linspace(2, -2, E)[None]])

    def step(state, _):
        routing = router.route({"weights": weights} | state, inputs, E, 16)
        load = routing.statistics["load"].value()
        return router.next_state(state, {"load": load}), load.max() / load.mean()

    _, violation = jax.jit(lambda state: jax.lax.scan(step, state, length=300))(
        router.init_state(E)
    )
    assert violation[0] > 2.5
    assert violation[-50:].mean() < 1.6


def test_the_bias_has_no_gradient_and_enters_no_gate():
    parameters, inputs = random_parameters(V3, bias=0.3), group(vectors(S, D))

    @jax.jit
    @jax.grad
    def gradient(parameters):
        routing = V3.route(parameters, inputs, E, S)
        return jnp.sum(routing.assignment.gates**2) + routing.losses["sequence_wise"].value()

    got = gradient(parameters)
    np.testing.assert_array_equal(got["bias"], 0)
    assert np.abs(got["weights"]).max() > 1e-3
    # The same for all experts: the selection stays, and so must the gates.
    shifted = parameters | {"bias": parameters["bias"] + 0.25}
    before, after = (v3_route(values, inputs).assignment for values in (parameters, shifted))
    np.testing.assert_array_equal(before.experts, after.experts)
    np.testing.assert_array_equal(before.gates, after.gates)


# What holds for both.


def test_states_and_parameters_have_different_names():
    assert V2.init_state(E) == {}
    np.testing.assert_array_equal(V3.init_state(E)["bias"], np.zeros(E))
    for router in (V2, V3):
        parameters = router.init(jax.random.key(0), 200, 100)
        assert set(parameters) == {"weights"}
        np.testing.assert_allclose(parameters["weights"].std(), 0.02, rtol=0.03)


def test_v2_explores_within_its_devices():
    router = dataclasses.replace(V2, exploration=Exploration.SAMPLE)
    route, parameters = jitted_route(router), random_parameters(V2)
    inputs = group(vectors(S, D))
    explored = np.asarray(route(parameters, inputs).assignment.experts)
    assert (explored != v2_route(parameters, inputs).assignment.experts).any()
    assert all(len(set(row // (E // 4))) <= 2 for row in explored)


@pytest.mark.parametrize("router", ROUTERS)
def test_gradients_equal_finite_differences(router):
    sequences = [0] * 4 + [1] * 5
    inputs = group(vectors(S, D, 4), mask=[True] * 7 + [False] * 2, sequence_ids=sequences)
    probe = vectors(S, 3, seed=5)
    parameters = random_parameters(router, seed=7, bias=0.3)  # No choice is near a tie.
    state = {name: value for name, value in parameters.items() if name != "weights"}

    @jax.jit
    def objective(weights):
        routing = router.route({"weights": weights} | state, inputs, E, S)
        losses = sum(loss.value() for loss in routing.losses.values())
        return jnp.sum(probe * routing.assignment.gates) + losses

    weights = 0.3 * parameters["weights"]
    check_grads(objective, (weights,), order=1, modes=["rev"], eps=1e-3, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("router", ROUTERS)
def test_values_and_gradients_are_finite(router):
    router = dataclasses.replace(
        router, losses=dataclasses.replace(router.losses, importance=0.1, router_z=0.1)
    )

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def objective(weights, state, inputs):
        routing = router.route({"weights": weights} | state, inputs, E, S)
        losses = sum(loss.value() for loss in routing.losses.values())
        return jnp.sum(routing.assignment.gates**2) + losses, routing

    weights = random_parameters(router)["weights"]
    # All equal; large; large with a bias that outweighs them.
    for scale, bias in [(0.0, 0.0), (300.0, 0.0), (300.0, 50.0)]:
        state = {name: bias * jnp.arange(E) for name in router.init_state(E)}
        for real in (True, False):
            inputs = group(vectors(S, D), mask=[real] * S)
            (_, routing), gradient = objective(scale * weights, state, inputs)
            for leaf in jax.tree.leaves((routing, gradient)):
                assert np.isfinite(leaf).all()
            if not real:
                assert all(float(loss.value()) == 0 for loss in routing.losses.values())


@pytest.mark.parametrize("router", ROUTERS)
def test_loss_coefficients_name_the_losses(router):
    parameters, inputs = random_parameters(router), group(vectors(S, D))
    assert set(v3_route(random_parameters(V3), inputs).losses) == {"sequence_wise"}
    quiet = dataclasses.replace(router, losses=dataclasses.replace(router.losses, **NO_LOSSES))
    for one in (router, quiet):
        routing = jax.eval_shape(jitted_route(one), parameters, inputs)
        assert set(routing.losses) == set(one.loss_coefficients)
    assert not quiet.loss_coefficients


NO_LOSSES = {name: 0.0 for name in (V2.losses.coefficients | V3.losses.coefficients)}


def test_v3_other_losses_count_the_experts_chosen():
    router = dataclasses.replace(V3, losses=Losses(expert_level=0.01))
    inputs = group(vectors(S, D))
    routing = jitted_route(router)(random_parameters(router, bias=1.0), inputs)
    expected = losses.expert_level(routing.probabilities, routing.assignment.experts, inputs.mask)
    np.testing.assert_allclose(routing.losses["expert_level"].value(), expected.value(), rtol=1e-5)


def test_the_papers_defaults_are_valid():
    DeepSeekV2().validate(160)
    DeepSeekV3().validate(256)
    assert DeepSeekV2().loss_coefficients == {
        "expert_level": 0.003,
        "device_level": 0.05,
        "communication": 0.02,
    }
    assert DeepSeekV3().loss_coefficients == {"sequence_wise": 1e-4}
    assert (DeepSeekV2().choices, DeepSeekV3().choices) == (6, 8)


@pytest.mark.parametrize(
    ("router", "message"),
    [
        (DeepSeekV2(k=5, losses=V2_LOSSES), "router.k is 5 but router.losses.devices_per_token=2"),
        (DeepSeekV2(k=3, losses=Losses(devices=3)), "router.losses.devices is 3,"),
        (DeepSeekV2(k=3, losses=V2_LOSSES, gate_scale=0.0), "router.gate_scale is 0.0;"),
        (
            DeepSeekV2(k=2, losses=V2_LOSSES, no_token_left_behind=True),
            "router.no_token_left_behind is True,",
        ),
        (DeepSeekV3(k=5, groups=4, groups_per_token=2), "router.k is 5 but router.groups_per_tok"),
        (DeepSeekV3(k=3, groups=3, groups_per_token=2), "router.groups is 3,"),
        (DeepSeekV3(k=3, groups=0, groups_per_token=0), "router.groups is 0,"),
        (DeepSeekV3(k=3, groups=4, groups_per_token=5), "router.groups_per_token is 5;"),
        (DeepSeekV3(k=3, groups=4, groups_per_token=0), "router.groups_per_token is 0;"),
        (DeepSeekV3(k=3, groups=4, gate_scale=-1.0), "router.gate_scale is -1.0;"),
        (DeepSeekV3(k=3, groups=4, bias_rate=-1.0), "router.bias_rate is -1.0;"),
        (DeepSeekV3(k=9), "router.k is 9 but there are 8 experts"),
        (
            DeepSeekV3(k=2, groups=4, groups_per_token=2, no_token_left_behind=True),
            "router.no_token_left_behind is True,",
        ),
    ],
)
def test_bad_fields_are_named(router, message):
    with pytest.raises(UserError) as error:
        router.validate(E)
    assert message in str(error.value)
    assert str(error.value).endswith(".")


def test_a_second_pass_is_fine_without_a_limit():
    router = DeepSeekV3(k=2, groups=1, groups_per_token=1, no_token_left_behind=True)
    router.validate(E)
    parameters, inputs = random_parameters(router), group(vectors(S, D))
    routing = jitted_route(router, capacity=1)(parameters, inputs)
    choice = jitted_choice(router, E)(parameters, inputs)
    moved = np.asarray(routing.assignment.experts != choice.experts)
    assert moved.any()
    # An expert of the second pass weighs 2.5 s over the sum of the scores first chosen.
    s = sigmoid(logits_of(parameters, inputs.x))
    first = np.take_along_axis(s, np.asarray(choice.experts), 1).sum(axis=1, keepdims=True)
    expected = 2.5 * np.take_along_axis(s, np.asarray(routing.assignment.experts), 1) / first
    np.testing.assert_allclose(routing.assignment.gates, expected, rtol=1e-4)
