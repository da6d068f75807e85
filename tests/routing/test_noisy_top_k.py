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
from moe_jax.routing.losses import Losses
from moe_jax.routing.noisy_top_k import (
    HierarchicalNoisyTopK,
    NoisyTopK,
    chance_kept,
    hierarchical_load,
    kth_excluding,
)
from tests.routing.inputs import group, vectors

S, D, E, A = 10, 5, 6, 3
FLAT = NoisyTopK(k=2)
TWO_LEVELS = HierarchicalNoisyTopK(k=1, groups=A, groups_per_token=2)
ROUTERS = [
    pytest.param(FLAT, id="flat"),
    pytest.param(TWO_LEVELS, id="hierarchical"),
]


def random_parameters(router, seed=3, num_experts=E, width=D):
    zeros = router.init(jax.random.key(0), width, num_experts)
    keys = jax.random.split(jax.random.key(seed), len(zeros))
    return {
        name: jax.random.normal(key, zeros[name].shape)
        for name, key in zip(sorted(zeros), keys, strict=True)
    }


def jitted_choice(router, num_experts=E):
    return jax.jit(lambda parameters, inputs: router.choose(parameters, inputs, num_experts))


def jitted_route(router, num_experts=E, capacity=S):
    def route(parameters, inputs):
        return router.route(parameters, inputs, num_experts, capacity)

    return jax.jit(route)


flat_choice = jitted_choice(FLAT)
two_level_choice = jitted_choice(TWO_LEVELS)
jitted_kth = jax.jit(kth_excluding, static_argnums=1)


# Slow references, from the paper's formulas.


def kth_largest_of_others(row, k, entry):
    """Equation 9's threshold; -inf where there are fewer than K others."""
    others = sorted((value for e, value in enumerate(row) if e != entry), reverse=True)
    return others[k - 1] if len(others) >= k else -math.inf


def chance(clean, noisy, deviation, k, entry):
    z = (clean[entry] - kth_largest_of_others(noisy, k, entry)) / deviation[entry]
    return (1 + math.erf(z / math.sqrt(2))) / 2


def top(row, k):
    return sorted(range(len(row)), key=lambda e: -row[e])[:k]


def sparse_softmax(row, k):
    kept = top(row, k)
    total = sum(math.exp(row[e]) for e in kept)
    return [math.exp(row[e]) / total if e in kept else 0.0 for e in range(len(row))]


def squared_variation(values):
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / len(values) / mean**2


def logits_by_loops(x, weights, noise_weights, key, train):
    """(clean, H, deviation) as NumPy float64, each [S, ...]."""
    clean = np.tensordot(np.float64(x), np.float64(weights), 1)
    deviation = np.log1p(np.exp(np.tensordot(np.float64(x), np.float64(noise_weights), 1)))
    noise = np.float64(jax.random.normal(key, clean.shape)) if train else 0.0
    return clean, clean + noise * deviation, deviation


def flat_by_loops(parameters, inputs, k):
    """(gates [S, E], experts, importance loss, load loss)."""
    clean, noisy, deviation = logits_by_loops(
        inputs.x, parameters["weights"], parameters["noise_weights"], inputs.key, inputs.train
    )
    gates = np.array([sparse_softmax(row, k) for row in noisy])
    experts = [top(row, k) for row in noisy]
    real = [s for s in range(len(inputs.x)) if inputs.mask[s]]
    importance = squared_variation([sum(gates[s, e] for s in real) for e in range(E)])
    load = squared_variation(
        [sum(chance(clean[s], noisy[s], deviation[s], k, e) for s in real) for e in range(E)]
    )
    return gates, experts, importance, load


def two_levels_by_loops(parameters, inputs, groups_per_token, k):
    """(gates [S, E], experts, importance loss, load loss), experts as sets."""
    first = logits_by_loops(
        inputs.x,
        parameters["primary"],
        parameters["primary_noise"],
        jax.random.fold_in(inputs.key, 2),
        inputs.train,
    )
    second = logits_by_loops(
        inputs.x,
        parameters["secondary"],
        parameters["secondary_noise"],
        jax.random.fold_in(inputs.key, 3),
        inputs.train,
    )
    per_group = E // A
    gates = np.zeros((len(inputs.x), E))
    members = {i: [] for i in range(A)}
    for s in range(len(inputs.x)):
        primary = sparse_softmax(first[1][s], groups_per_token)
        for i in top(first[1][s], groups_per_token):
            if inputs.mask[s]:
                members[i].append(s)
            for j, gate in enumerate(sparse_softmax(second[1][s, i], k)):
                gates[s, i * per_group + j] = primary[i] * gate
    real = [s for s in range(len(inputs.x)) if inputs.mask[s]]
    importance = squared_variation([sum(gates[s, e] for s in real) for e in range(E)])
    loads = []
    for i in range(A):
        load_primary = sum(
            chance(first[0][s], first[1][s], first[2][s], groups_per_token, i) for s in real
        )
        for j in range(per_group):
            load_within = sum(
                chance(second[0][s, i], second[1][s, i], second[2][s, i], k, j) for s in members[i]
            )
            loads.append(load_primary * load_within / max(len(members[i]), 1))
    experts = [set(np.flatnonzero(row)) for row in gates]
    return gates, experts, importance, squared_variation(loads)


# Worked out by hand.


def test_flat_gates_and_importance_by_hand():
    # Three tokens (unit vectors), K = 2, no noise. exp of the logits, the kept and their gates:
    #   6 3 1   0 1   2/3 1/3  -
    #   1 3 2   1 2    -  .6  .4
    #   2 1 8   2 0   .2   -  .8
    # Sums 13/15, 14/15, 18/15: mean 1, squared deviations (4 + 1 + 9) / 225, over 3: 14 / 675.
    logits = jnp.log(jnp.array([[6.0, 3, 1], [1, 3, 2], [2, 1, 8]]))
    parameters = {"weights": logits, "noise_weights": jnp.zeros((3, 3))}
    choice = jitted_choice(FLAT, 3)(parameters, group(jnp.eye(3), train=False))
    np.testing.assert_array_equal(choice.experts, [[0, 1], [1, 2], [2, 0]])
    # What is not kept has its weight against the kept: 1/9, 1/5, 1/10.
    np.testing.assert_allclose(
        choice.weights, [[2 / 3, 1 / 3, 1 / 9], [1 / 5, 0.6, 0.4], [0.2, 0.1, 0.8]], rtol=1e-5
    )
    np.testing.assert_allclose(choice.losses["gate_importance"].value(), 14 / 675, rtol=1e-4)


def test_threshold_leaves_the_entry_itself_out():
    # Without 5: 3 2 1, without 3: 5 2 1, so the second is 2; without 1 or 2 it is 3.
    np.testing.assert_array_equal(kth_excluding(jnp.array([5.0, 3, 1, 2]), 2), [2, 2, 3, 3])


def test_chance_of_being_kept_by_hand():
    # K = 1: the others' largest noisy logits are 0.5, 2, 2, so
    # z = (1 - 0.5) / 1, (0 - 2) / 0.5, (-1 - 2) / 2 = 0.5, -4, -1.5.
    got = chance_kept(
        jnp.array([1.0, 0, -1]), jnp.array([2.0, 0.5, -1]), jnp.array([1.0, 0.5, 2]), 1
    )
    np.testing.assert_allclose(got, [0.69146246, 3.1671e-5, 0.0668072], rtol=1e-4)


def test_hierarchical_load_by_hand():
    # Tokens 0 and 2 chose group 0, token 1 group 1; token 3 is padding.
    # Load_primary = 0.9 + 0.2 + 0.6, 0.1 + 0.8 + 0.4 = 1.7, 1.3.
    # Group 0: (0.7 + 0.5) / 2, (0.3 + 0.5) / 2 = 0.6, 0.4; group 1: 0.2, 0.8.
    # Load_H = 1.02 0.68 0.26 1.04: mean 0.75, variance 0.402 / 4, over 0.75^2: 0.17866667.
    primary = jnp.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [1.0, 0.0]])
    secondary = jnp.array(
        [
            [[0.7, 0.3], [0.0, 1.0]],
            [[1.0, 1.0], [0.2, 0.8]],
            [[0.5, 0.5], [0.0, 1.0]],
            [[1.0, 0.0], [1.0, 0.0]],
        ]
    )
    chosen = jnp.array([[True, False], [False, True], [True, False], [True, False]])
    loss = hierarchical_load(primary, secondary, chosen, jnp.array([True, True, True, False]))
    np.testing.assert_allclose(loss.value(), 0.402 / 4 / 0.75**2, rtol=1e-5)


def test_hierarchical_gates_by_hand():
    # One token, two groups of two, both chosen, one expert of each. exp of the logits:
    # groups 3 1 -> 3/4 1/4; in group 0: 1 4 -> expert 1; in group 1: 2 1 -> expert 2.
    # Flat gates 3/4 of expert 1 and 1/4 of expert 2; dense 3/4 * 1/5, 4/5 and 1/4 * 2/3, 1/3.
    parameters = {
        "primary": jnp.log(jnp.array([[3.0, 1]])),
        "primary_noise": jnp.zeros((1, 2)),
        "secondary": jnp.log(jnp.array([[[1.0, 4], [2, 1]]])),
        "secondary_noise": jnp.zeros((1, 2, 2)),
    }
    router = HierarchicalNoisyTopK(k=1, groups=2, groups_per_token=2)
    choice = jitted_choice(router, 4)(parameters, group(jnp.ones((1, 1)), train=False))
    np.testing.assert_array_equal(choice.experts, [[1, 2]])
    np.testing.assert_allclose(choice.weights[0, jnp.array([1, 2])], [0.75, 0.25], rtol=1e-5)
    np.testing.assert_allclose(choice.probabilities, [[0.15, 0.6, 1 / 6, 1 / 12]], rtol=1e-5)
    # Expert 0 against the kept of its group: 3/4 * 1/4.
    np.testing.assert_allclose(choice.weights[0, 0], 3 / 16, rtol=1e-5)
    # Sums 0 3/4 1/4 0: mean 1/4, variance (1 + 4 + 0 + 1) / 64, over 1/16: 1.5.
    np.testing.assert_allclose(choice.losses["gate_importance"].value(), 1.5, rtol=1e-5)


# Against the loops.

masks = st.lists(st.booleans(), min_size=S, max_size=S).filter(any)


@given(st.integers(1, 4), st.lists(st.integers(-3, 3), min_size=4, max_size=4))
@settings(max_examples=30, deadline=None)
def test_threshold_equals_the_loop_with_ties_and_with_all_kept(k, row):
    expected = [max(kth_largest_of_others(row, k, e), -1e9) for e in range(4)]
    np.testing.assert_array_equal(jitted_kth(jnp.array(row, jnp.float32), k), expected)


@given(st.integers(0, 1000), masks, st.booleans())
@settings(max_examples=20, deadline=None)
def test_flat_router_equals_the_loop(seed, mask, train):
    parameters = random_parameters(FLAT, seed)
    inputs = group(vectors(S, D, seed), mask=mask, seed=seed, train=train)
    choice = flat_choice(parameters, inputs)
    gates, experts, importance, load = flat_by_loops(parameters, inputs, k=2)
    np.testing.assert_array_equal(choice.experts, experts)
    chosen = np.take_along_axis(np.asarray(choice.weights), np.asarray(choice.experts), axis=1)
    np.testing.assert_allclose(chosen, np.take_along_axis(gates, np.array(experts), 1), rtol=1e-3)
    np.testing.assert_allclose(choice.losses["gate_importance"].value(), importance, rtol=1e-3)
    assert ("load" in choice.losses) == train
    if train:
        np.testing.assert_allclose(choice.losses["load"].value(), load, rtol=1e-3, atol=1e-5)


@given(st.integers(0, 1000), masks, st.booleans())
@settings(max_examples=20, deadline=None)
def test_hierarchical_router_equals_the_loop(seed, mask, train):
    parameters = random_parameters(TWO_LEVELS, seed)
    inputs = group(vectors(S, D, seed), mask=mask, seed=seed, train=train)
    choice = two_level_choice(parameters, inputs)
    gates, experts, importance, load = two_levels_by_loops(parameters, inputs, 2, k=1)
    assert [set(row) for row in np.asarray(choice.experts)] == experts
    chosen = np.take_along_axis(np.asarray(choice.weights), np.asarray(choice.experts), axis=1)
    np.testing.assert_allclose(chosen, -np.sort(-gates, axis=1)[:, :2], rtol=1e-3)
    np.testing.assert_allclose(choice.losses["gate_importance"].value(), importance, rtol=1e-3)
    assert ("load" in choice.losses) == train
    if train:
        np.testing.assert_allclose(choice.losses["load"].value(), load, rtol=1e-3, atol=1e-5)


# What holds for both.


@pytest.mark.parametrize("router", ROUTERS)
def test_gates_sum_to_one_and_probabilities_too(router):
    routing = jitted_route(router)(random_parameters(router), group(vectors(S, D)))
    assert routing.assignment.experts.shape == (S, router.choices)
    assert all(len(set(row)) == router.choices for row in np.asarray(routing.assignment.experts))
    np.testing.assert_allclose(routing.assignment.gates.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(routing.probabilities.sum(axis=1), 1, rtol=1e-5)
    assert np.all(np.diff(routing.assignment.gates, axis=1) <= 0), "the first choice is not first"


@pytest.mark.parametrize("router", ROUTERS)
def test_weights_start_at_zero_and_only_noise_spreads_the_tokens(router):
    parameters = router.init(jax.random.key(0), D, E)
    assert all(not value.any() for value in parameters.values())
    choose = jitted_choice(router)
    noisy = choose(parameters, group(vectors(S, D)))
    np.testing.assert_allclose(noisy.clean, 1 / E, rtol=1e-6)
    assert len({tuple(row) for row in np.asarray(noisy.experts)}) > 1
    quiet = choose(parameters, group(vectors(S, D), train=False))
    assert len({tuple(row) for row in np.asarray(quiet.experts)}) == 1
    np.testing.assert_allclose(quiet.probabilities, 1 / E, rtol=1e-6)


def test_noise_at_the_start_has_the_deviation_ln_2():
    parameters = FLAT.init(jax.random.key(0), D, E)
    keys = jax.random.split(jax.random.key(1), 200)
    inputs = group(vectors(S, D))
    logits = jax.vmap(
        lambda key: flat_choice(parameters, dataclasses.replace(inputs, key=key)).logits
    )(keys)
    # 12,000 draws: the estimate is off by 0.7 % (one deviation).
    np.testing.assert_allclose(logits.std(), math.log(2), rtol=0.03)


def test_one_group_is_the_flat_router_and_so_are_groups_of_one_expert():
    inputs = group(vectors(S, D), train=False)
    weights = random_parameters(FLAT)["weights"]
    expected = flat_choice({"weights": weights, "noise_weights": weights}, inputs)
    one_group = HierarchicalNoisyTopK(k=2, groups=1, groups_per_token=1)
    single = HierarchicalNoisyTopK(k=1, groups=E, groups_per_token=2)
    ones, flat = jnp.ones((D, 1)), weights[:, None]
    cases = [
        (one_group, {"primary": ones, "secondary": flat}),
        (single, {"primary": weights, "secondary": jnp.ones((D, E, 1))}),
    ]
    for router, parameters in cases:
        parameters |= {f"{name}_noise": value for name, value in parameters.items()}
        choice = jitted_choice(router)(parameters, inputs)
        np.testing.assert_array_equal(choice.experts, expected.experts)
        np.testing.assert_allclose(choice.weights, expected.weights, rtol=1e-4)
        np.testing.assert_allclose(choice.probabilities, expected.probabilities, rtol=1e-4)


@pytest.mark.parametrize("router", ROUTERS)
def test_gradients_equal_finite_differences(router):
    inputs = group(vectors(S, D, seed=4), mask=[True] * (S - 2) + [False] * 2)
    probe = vectors(S, router.choices, seed=5)

    @jax.jit
    def objective(parameters):
        routing = router.route(parameters, inputs, E, S)
        losses = sum(loss.value() for loss in routing.losses.values())
        return jnp.sum(probe * routing.assignment.gates) + losses

    parameters = jax.tree.map(lambda w: 0.3 * w, random_parameters(router, seed=6))
    check_grads(objective, (parameters,), order=1, modes=["rev"], eps=1e-3, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    "router",
    [
        *ROUTERS,
        pytest.param(NoisyTopK(k=E), id="K = E"),
        pytest.param(
            HierarchicalNoisyTopK(k=E // A, groups=A, groups_per_token=A), id="all of all"
        ),
    ],
)
def test_values_and_gradients_are_finite(router, train):
    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def objective(parameters, inputs):
        routing = router.route(parameters, inputs, E, S)
        losses = sum(loss.value() for loss in routing.losses.values())
        return jnp.sum(routing.assignment.gates**2) + losses, routing

    for scale in (0.0, 1.0, 1e3):  # 1e3: some deviations underflow.
        parameters = jax.tree.map(lambda w, scale=scale: scale * w, random_parameters(router))
        for real in (True, False):
            inputs = group(vectors(S, D), mask=[real] * S, train=train)
            (_, routing), gradient = objective(parameters, inputs)
            for leaf in jax.tree.leaves((routing, gradient)):
                assert np.isfinite(leaf).all()
            if train and (router.choices == E or not real):
                assert float(routing.losses["load"].value()) == 0


@pytest.mark.parametrize("router_class", [NoisyTopK, HierarchicalNoisyTopK])
def test_loss_coefficients_name_the_losses_and_zero_leaves_one_out(router_class):
    fields = {"k": 1, "groups": A} if router_class is HierarchicalNoisyTopK else {"k": 2}
    inputs = group(vectors(S, D))
    default = router_class(**fields)
    assert default.loss_coefficients == {"gate_importance": 0.1, "load": 0.1}
    some = router_class(
        **fields, losses=Losses(router_z=1e-3), importance_weight=0.0, load_weight=0.2
    )
    assert some.loss_coefficients == {"router_z": 1e-3, "load": 0.2}
    for router in (default, some, router_class(**fields, load_weight=0.0)):
        parameters = router.init(jax.random.key(0), D, E)
        routing = jax.eval_shape(jitted_route(router), parameters, inputs)
        assert set(routing.losses) == set(router.loss_coefficients)


def test_z_loss_of_a_hierarchy_sees_the_primary_logits():
    parameters = random_parameters(TWO_LEVELS)
    inputs = group(vectors(S, D), train=False)
    primary = np.float64(inputs.x) @ np.float64(parameters["primary"])
    expected = np.mean([math.log(sum(math.exp(value) for value in row)) ** 2 for row in primary])
    got = jitted_route(TWO_LEVELS)(parameters, inputs).statistics["logsumexp_squared"]
    np.testing.assert_allclose(got.value(), expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("router", "message"),
    [
        (NoisyTopK(k=E + 1), f"router.k is {E + 1} "),
        (NoisyTopK(importance_weight=-1.0), "router.importance_weight is -1.0;"),
        (NoisyTopK(load_weight=float("nan")), "router.load_weight is nan;"),
        (HierarchicalNoisyTopK(groups=4), "router.groups is 4, which does not divide the 6"),
        (HierarchicalNoisyTopK(groups=0), "router.groups is 0, which does not divide the 6"),
        (HierarchicalNoisyTopK(groups=2, groups_per_token=3), "router.groups_per_token is 3;"),
        (HierarchicalNoisyTopK(groups=2, groups_per_token=0), "router.groups_per_token is 0;"),
        (HierarchicalNoisyTopK(k=3, groups=3), "router.k is 3 but a group has 2 experts"),
    ],
)
def test_bad_fields_are_named(router, message):
    with pytest.raises(UserError) as error:
        router.validate(E)
    assert message in str(error.value)
    assert str(error.value).endswith(".")


def test_the_papers_defaults_are_valid():
    NoisyTopK().validate(32)
    HierarchicalNoisyTopK().validate(256)
    assert NoisyTopK().choices == HierarchicalNoisyTopK().choices == 4
