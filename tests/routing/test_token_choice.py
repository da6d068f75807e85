import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from moe_jax import reference
from moe_jax.errors import UserError
from moe_jax.routing import losses, priority
from moe_jax.routing.balanced import BASE
from moe_jax.routing.deepseek import DeepSeekV2
from moe_jax.routing.losses import Losses
from moe_jax.routing.priority import Priority
from moe_jax.routing.scores import Exploration, RouterDtype
from moe_jax.routing.token_choice import GShard, LaterChoices, TopK, VMoE
from tests.routing.inputs import group, vectors

S, D, E = 12, 6, 5


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(0), (S, D))


@pytest.fixture(scope="module")
def parameters():
    return {"weights": jax.random.normal(jax.random.key(1), (D, E))}


def route(router, parameters, inputs, num_experts=E, capacity=S):
    """Compiled as a whole, which is faster than one operation at a time."""

    def run(parameters, inputs):
        return router.route(parameters, inputs, num_experts, capacity)

    return jax.jit(run)(parameters, inputs)


def route_logits(router, logits, capacity, **more):
    """Routes tokens whose logits are given."""
    logits = jnp.asarray(logits, jnp.float32)
    num_experts = logits.shape[1]
    inputs = group(logits, **more)
    return route(router, {"weights": jnp.eye(num_experts)}, inputs, num_experts, capacity)


def choose_alike(router, probabilities, seed=0, count=4096):
    """What `count` tokens with the same probabilities choose in training."""
    logits = jnp.tile(jnp.log(jnp.array(probabilities)), (count, 1))
    num_experts = len(probabilities)

    def run(inputs):
        return router.choose({"weights": jnp.eye(num_experts)}, inputs, num_experts)

    return jax.jit(run)(group(logits, seed=seed))


# Four standard errors of a frequency over 4,096 tokens are at most this.
FREQUENCY = 4 * 0.5 / 64


# Softmax, then the K largest.

PROBABILITIES = np.array([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.1, 0.2, 0.7]])


@pytest.mark.parametrize(
    ("router", "gates"),
    [
        (TopK(k=1), [[0.6], [0.5], [0.7]]),  # Switch.
        (TopK(k=2), [[0.6, 0.3], [0.5, 0.3], [0.7, 0.2]]),  # DeepSeekMoE: not renormalised.
        # Mixtral: over their sums 0.9, 0.8 and 0.9.
        (TopK(k=2, renormalize=True), [[2 / 3, 1 / 3], [5 / 8, 3 / 8], [7 / 9, 2 / 9]]),
        (GShard(), [[2 / 3, 1 / 3], [5 / 8, 3 / 8], [7 / 9, 2 / 9]]),
        (VMoE(), [[0.6, 0.3], [0.5, 0.3], [0.7, 0.2]]),
    ],
    ids=["switch", "deepseek_moe", "mixtral", "gshard", "vmoe"],
)
def test_gates_by_hand(router, gates):
    got = route_logits(router, np.log(PROBABILITIES), 3, train=False).assignment
    np.testing.assert_allclose(got.gates, gates, rtol=1e-5)
    experts = np.array([[0, 1], [1, 2], [2, 1]])[:, : router.choices]
    np.testing.assert_array_equal(got.experts, experts)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_gates_are_the_k_largest_probabilities(x, parameters, k):
    assignment = route(TopK(k=k), parameters, group(x)).assignment
    probabilities = np.asarray(jax.nn.softmax(x @ parameters["weights"]))
    np.testing.assert_array_equal(assignment.experts, reference.top_k(probabilities, k))
    np.testing.assert_allclose(assignment.gates, -np.sort(-probabilities)[:, :k], rtol=1e-5)
    assert assignment.experts.dtype == jnp.int32


def test_mixtral_is_a_softmax_over_the_selected_logits(x, parameters):
    assignment = route(TopK(k=3, renormalize=True), parameters, group(x)).assignment
    logits = np.asarray(x @ parameters["weights"])
    for s in range(S):
        chosen = np.exp(sorted(logits[s], reverse=True)[:3])
        np.testing.assert_allclose(assignment.gates[s], chosen / chosen.sum(), rtol=1e-5)


def test_renormalized_gates_sum_to_one_and_keep_their_ratios(x, parameters):
    plain = route(TopK(k=2), parameters, group(x)).assignment.gates
    gates = route(TopK(k=2, renormalize=True), parameters, group(x)).assignment.gates
    np.testing.assert_allclose(gates.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(gates[:, 0] / gates[:, 1], plain[:, 0] / plain[:, 1], rtol=1e-5)


def test_gate_scale_multiplies_the_gates(x, parameters):
    for renormalize in (False, True):
        plain, scaled = (
            route(
                TopK(k=2, renormalize=renormalize, gate_scale=scale, losses=Losses(router_z=1.0)),
                parameters,
                group(x),
            )
            for scale in (1.0, 2.5)
        )
        np.testing.assert_allclose(scaled.assignment.gates, 2.5 * plain.assignment.gates, rtol=1e-6)
        np.testing.assert_array_equal(
            scaled.losses["router_z"].total, plain.losses["router_z"].total
        )


def test_equal_logits_go_to_the_first_experts(x):
    assignment = route(TopK(k=2), {"weights": jnp.zeros((D, E))}, group(x)).assignment
    np.testing.assert_array_equal(assignment.experts, np.tile([0, 1], (S, 1)))


def test_a_soft_cap_bounds_the_logits(x, parameters):
    wide = {"weights": 100 * parameters["weights"]}
    routing = route(TopK(logit_soft_cap=2.0, losses=Losses(router_z=1.0)), wide, group(x))
    expected = jax.nn.softmax(2 * jnp.tanh(x @ wide["weights"] / 2))
    np.testing.assert_allclose(routing.probabilities, expected, rtol=1e-4)
    # No logit above 2: logsumexp is at most 2 + ln 5.
    assert routing.losses["router_z"].value() <= (2 + np.log(E)) ** 2


def in_bfloat16(x):
    return np.asarray(jnp.asarray(x).astype(jnp.bfloat16).astype(jnp.float32))


ROUNDED = {
    "top_k": TopK(k=2, gate_scale=3.0),
    "renormalized": TopK(k=2, renormalize=True),
    "gshard": GShard(later_choices=LaterChoices.ALL),
    "deepseek_v2": DeepSeekV2(k=2, losses=Losses(devices=5, devices_per_token=3)),
}


@pytest.mark.parametrize("router", ROUNDED.values(), ids=ROUNDED)
def test_a_bfloat16_router_has_bfloat16_gates(router, x, parameters):
    narrow = dataclasses.replace(router, dtype=RouterDtype.BFLOAT16)
    rounded = route(narrow, parameters, group(x))
    exact = route(router, parameters, group(x))
    for got, full in (
        (rounded.assignment.gates, exact.assignment.gates),
        (rounded.probabilities, exact.probabilities),
    ):
        assert got.dtype == jnp.float32
        np.testing.assert_array_equal(got, in_bfloat16(got))
        assert (full != in_bfloat16(full)).any(), "the default router rounds"
    # Logits below 8 are off by 1/64 at most for each of the operands and the logit itself.
    np.testing.assert_allclose(rounded.probabilities, exact.probabilities, rtol=0.1)


def test_a_bfloat16_router_equals_its_definition(x, parameters):
    logits = in_bfloat16(in_bfloat16(x) @ in_bfloat16(parameters["weights"]))
    probabilities = in_bfloat16(jax.nn.softmax(logits))
    choice = TopK(dtype=RouterDtype.BFLOAT16).choose(parameters, group(x), E)
    np.testing.assert_array_equal(choice.logits, in_bfloat16(choice.logits))
    # The sums of a product may be in another order, and so be rounded to the number beside.
    np.testing.assert_allclose(choice.logits, logits, rtol=2**-7, atol=1e-6)
    np.testing.assert_allclose(choice.probabilities, probabilities, rtol=0.05)


def test_routers_are_float32_by_default():
    for router in (TopK(), GShard(), DeepSeekV2()):
        assert router.dtype == RouterDtype.FLOAT32


def test_initial_weights_have_the_shape_of_the_layer():
    for router in (TopK(), GShard(), VMoE()):
        weights = router.init(jax.random.key(0), D, E)["weights"]
        assert (weights.shape, weights.dtype) == ((D, E), jnp.float32)
    # V-MoE's are LeCun normal: deviation 1 / sqrt(d), four standard errors of 4,096 numbers.
    wide = VMoE().init(jax.random.key(0), 64, 64)["weights"]
    assert wide.std() == pytest.approx(1 / 8, rel=0.045)


# Exploration.


def test_jitter_only_in_training_and_reproducible_from_the_key(x, parameters):
    def gates(jitter, train, seed=0):
        exploration = Exploration.JITTER if jitter else Exploration.ARGMAX
        router = TopK(exploration=exploration, exploration_rate=jitter)
        return route(router, parameters, group(x, seed=seed, train=train)).assignment.gates

    np.testing.assert_array_equal(gates(0.1, train=False), gates(0.0, train=False))
    np.testing.assert_array_equal(gates(0.1, train=True), gates(0.1, train=True))
    assert (gates(0.1, train=True) != gates(0.0, train=True)).any()
    assert (gates(0.1, train=True) != gates(0.1, train=True, seed=1)).any()
    # Bounded: 1 +- epsilon on every input moves a logit by at most epsilon * |x| |w|.
    np.testing.assert_allclose(gates(1e-4, train=True), gates(0.0, train=True), atol=1e-3)


def test_input_dropout_reaches_the_router(x, parameters):
    router = TopK(exploration=Exploration.INPUT_DROPOUT, exploration_rate=0.5)
    train, evaluation = (
        route(router, parameters, group(x, train=train)).probabilities for train in (True, False)
    )
    np.testing.assert_allclose(evaluation, jax.nn.softmax(x @ parameters["weights"]), rtol=1e-5)
    assert (train != evaluation).any()


SKEWED = [0.5, 0.3, 0.15, 0.05]


@pytest.mark.parametrize("router", [TopK, GShard])
def test_sampled_first_choices_follow_the_softmax(router):
    choice = choose_alike(router(exploration=Exploration.SAMPLE), SKEWED)
    first = np.bincount(choice.experts[:, 0], minlength=4) / 4096
    np.testing.assert_allclose(first, SKEWED, atol=FREQUENCY)


def test_sampled_second_choices_follow_the_softmax_without_the_first():
    experts = np.asarray(choose_alike(TopK(k=2, exploration=Exploration.SAMPLE), SKEWED).experts)
    assert (experts[:, 0] != experts[:, 1]).all()
    after_0 = experts[experts[:, 0] == 0, 1]
    expected = np.array([0, 0.3, 0.15, 0.05]) / 0.5
    frequency = np.bincount(after_0, minlength=4) / len(after_0)
    np.testing.assert_allclose(frequency, expected, atol=4 * 0.5 / len(after_0) ** 0.5)


def test_sampling_keeps_the_gates_of_the_softmax_and_stops_in_evaluation(x, parameters):
    router = TopK(k=2, exploration=Exploration.SAMPLE)
    sampled = route(router, parameters, group(x)).assignment
    p = jax.nn.softmax(x @ parameters["weights"])
    np.testing.assert_allclose(
        sampled.gates, np.take_along_axis(np.asarray(p), np.asarray(sampled.experts), 1), rtol=1e-5
    )
    best = route(router, parameters, group(x, train=False)).assignment
    np.testing.assert_array_equal(best.experts, reference.top_k(p, 2))
    assert (sampled.experts != best.experts).any()


def test_the_router_works_in_float32_under_bfloat16_input(x, parameters):
    narrow = x.astype(jnp.bfloat16)
    router = TopK(k=2, losses=ALL_LOSSES)
    got = route(router, parameters, group(narrow))
    wide = route(router, parameters, group(narrow.astype(jnp.float32)))
    assert got.assignment.gates.dtype == got.probabilities.dtype == jnp.float32
    assert {m.total.dtype for m in [*got.losses.values(), *got.statistics.values()]} == {
        jnp.dtype(jnp.float32)
    }
    jax.tree.map(np.testing.assert_array_equal, got, wide)


# GShard and its optional later choices.


@pytest.mark.parametrize(
    ("second", "frequency"),
    # Normalised 1/7, over the threshold 0.2: 5/7. (Before it is normalised: 0.1 / 0.2.)
    [(0.1, 5 / 7), (0.02, 10 / 62), (0.3, 1.0)],
)
def test_a_random_second_choice_is_kept_in_proportion_to_its_normalised_gate(second, frequency):
    rest = (0.4 - second) / 100
    probabilities = [0.6, second, *[rest] * 100]
    experts = np.asarray(choose_alike(GShard(threshold=0.2), probabilities).experts)
    assert (experts[:, 0] == 0).all(), "the first choice is not optional"
    kept = experts[:, 1] == 1
    assert (kept | (experts[:, 1] == len(probabilities))).all()
    assert kept.mean() == pytest.approx(frequency, abs=FREQUENCY)
    assert kept.all() == (frequency == 1)


@pytest.mark.parametrize(
    ("policy", "seconds"),
    [
        ("all", [1, 1, 1]),
        ("none", [3, 3, 3]),
        ("threshold", [1, 3, 3]),
    ],
)
def test_later_choices_by_policy(policy, seconds):
    # Normalised second gates 3/9, 1/9 and 1/6; the threshold is 1/5.
    logits = np.log([[0.6, 0.3, 0.1], [0.8, 0.1, 0.1], [0.75, 0.15, 0.1]])
    for router, train in (
        (GShard(later_choices=LaterChoices(policy), threshold=0.2), True),
        (GShard(evaluation_later_choices=LaterChoices(policy), threshold=0.2), False),
    ):
        assignment = route_logits(router, logits, 3, train=train).assignment
        np.testing.assert_array_equal(assignment.experts, [[0, e] for e in seconds])
        # Divided by the sum of both choices, also where only one of them is left.
        first, second = np.array([6 / 9, 8 / 9, 5 / 6]), np.array([3 / 9, 1 / 9, 1 / 6])
        np.testing.assert_allclose(assignment.gates[:, 0], first, rtol=1e-5)
        kept = np.where(np.array(seconds) == 1, second, 0)
        np.testing.assert_allclose(assignment.gates[:, 1], kept, rtol=1e-5)


def test_a_left_out_choice_takes_no_slot_and_is_not_a_drop():
    logits = np.log([[0.6, 0.3, 0.1]] * 3)
    routing = route_logits(GShard(later_choices=LaterChoices.NONE), logits, 2)
    np.testing.assert_array_equal(routing.assignment.position_in_expert, [[0, 2], [1, 2], [2, 2]])
    np.testing.assert_allclose(routing.statistics["load"].value(), [1, 0, 0])
    assert routing.statistics["dropped"].value() == pytest.approx(1 / 3)


def test_each_later_choice_of_top_n_is_optional_by_itself():
    # Normalised gates 0.75, 0.15 and 0.1 with threshold 0.2: kept with 3/4 and 1/2, independently.
    experts = np.asarray(
        choose_alike(GShard(k=3, threshold=0.2), [0.6, 0.12, 0.08, *[0.02] * 10]).experts
    )
    second, third = experts[:, 1] == 1, experts[:, 2] == 2
    assert second.mean() == pytest.approx(3 / 4, abs=FREQUENCY)
    assert third.mean() == pytest.approx(1 / 2, abs=FREQUENCY)
    assert (second & third).mean() == pytest.approx(3 / 8, abs=FREQUENCY)


def test_evaluation_of_gshard_keeps_all_choices_whatever_the_key():
    logits = np.log([[0.9, 0.06, 0.04]] * 8)
    first, second = (
        route_logits(GShard(), logits, 8, train=False, seed=seed).assignment for seed in (0, 1)
    )
    assert (first.experts == jnp.array([0, 1])).all()
    np.testing.assert_array_equal(first.experts, second.experts)


# V-MoE.


@pytest.mark.parametrize("noise", [1.0, 3.0])
def test_vmoe_noise_has_the_deviation_noise_over_e(noise):
    choice = choose_alike(VMoE(noise=noise), [0.25, 0.25, 0.25, 0.25])
    added = np.asarray(choice.logits) - np.log(0.25)
    # 16,384 numbers: four standard errors.
    assert added.std() == pytest.approx(noise / 4, rel=0.023)
    assert added.mean() == pytest.approx(0, abs=4 * noise / 4 / 128)
    np.testing.assert_allclose(choice.clean, 0.25, rtol=1e-6)


def test_vmoe_gates_are_the_noisy_softmax_and_are_not_renormalised(x, parameters):
    routing = route(VMoE(noise=4.0), parameters, group(x))
    noisy, assignment = np.asarray(routing.probabilities), routing.assignment
    np.testing.assert_array_equal(assignment.experts, reference.top_k(noisy, 2))
    np.testing.assert_allclose(assignment.gates, -np.sort(-noisy)[:, :2], rtol=1e-6)
    assert (assignment.gates.sum(axis=1) < 1).all()
    assert (jnp.abs(noisy - jax.nn.softmax(x @ parameters["weights"])) > 0.01).any()


def test_vmoe_importance_reads_the_clean_probabilities(x, parameters):
    routing = route(VMoE(noise=4.0), parameters, group(x))
    clean = jax.nn.softmax(x @ parameters["weights"])
    expected = losses.importance(clean, jnp.ones(S, bool)).value()
    assert routing.losses["importance"].value() == pytest.approx(float(expected), rel=1e-4)


def test_vmoe_load_loss_reads_the_noisy_threshold(x, parameters):
    routing = route(VMoE(), parameters, group(x))
    assert routing.losses.keys() == {"importance", "load"}
    clean = x @ parameters["weights"]
    noise = jax.random.normal(group(x).key, clean.shape) / E
    threshold = jnp.sort(clean + noise, axis=1)[:, -2:-1]
    expected = losses.load(clean, threshold, 1 / E, jnp.ones(S, bool)).value()
    assert routing.losses["load"].value() == pytest.approx(float(expected), rel=1e-4)


def test_vmoe_has_neither_noise_nor_load_loss_in_evaluation(x, parameters):
    routing = route(VMoE(), parameters, group(x, train=False))
    assert routing.losses.keys() == {"importance"}
    expected = jax.nn.softmax(x @ parameters["weights"])
    np.testing.assert_allclose(routing.probabilities, expected, rtol=1e-5)


def test_vmoe_without_noise_has_no_load_loss(x, parameters):
    routing = route(VMoE(noise=0.0, load_weight=0.0), parameters, group(x))
    assert routing.losses.keys() == {"importance"}
    expected = jax.nn.softmax(x @ parameters["weights"])
    np.testing.assert_allclose(routing.probabilities, expected, rtol=1e-5)


# No Token Left Behind.


def test_second_pass_by_hand():
    # All want expert 0, which serves token 0. Token 1 is next best served by expert 2, and so is
    # token 2, which finds it full.
    logits = np.log([[0.7, 0.2, 0.05, 0.05], [0.6, 0.1, 0.25, 0.05], [0.5, 0.05, 0.4, 0.05]])
    routing = route_logits(TopK(no_token_left_behind=True), logits, 1)
    np.testing.assert_array_equal(routing.assignment.experts, [[0], [2], [0]])
    np.testing.assert_array_equal(routing.assignment.position_in_expert, [[0], [0], [1]])
    np.testing.assert_allclose(routing.assignment.gates, [[0.7], [0.25], [0.5]], rtol=1e-5)
    # The load is of what was wanted, the drops of what came of it.
    np.testing.assert_allclose(routing.statistics["load"].value(), [1, 0, 0, 0])
    assert routing.statistics["dropped"].value() == pytest.approx(1 / 3)


def slow_two_passes(probabilities, mask, choices, capacity, by_rank):
    """Experts and slots [S][K] after both passes, served one assignment at a time."""
    tokens, num_experts = probabilities.shape
    ranked = [sorted(range(num_experts), key=lambda e, p=p: -p[e]) for p in probabilities]
    experts = [row[:choices] for row in ranked]
    slots = [[capacity] * choices for _ in ranked]
    queue = [(s, k) for s in range(tokens) for k in range(choices)]
    if by_rank:
        queue.sort(key=lambda pair: pair[1])
    used = [0] * num_experts
    for first_pass in (True, False):
        for s, k in queue:
            if mask[s] and slots[s][k] == capacity:
                # The k-th choice, and then the k-th of the experts that were not chosen.
                expert = ranked[s][k if first_pass else choices + k]
                if used[expert] < capacity:
                    experts[s][k], slots[s][k] = expert, used[expert]
                    used[expert] += 1
    return np.array(experts), np.array(slots)


@functools.cache
def two_passes(order, capacity):
    router = TopK(k=2, order=order, no_token_left_behind=True)
    return jax.jit(
        lambda inputs: router.route({"weights": jnp.eye(E)}, inputs, E, capacity).assignment
    )


@pytest.mark.parametrize("order", ["token", "choice"])
@given(seed=st.integers(0, 2**32 - 1), capacity=st.integers(1, 3), scale=st.sampled_from([0.3, 3]))
@settings(max_examples=20, deadline=None)
def test_second_pass_equals_the_loop(order, seed, capacity, scale):
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(7, E)) + scale * np.arange(E)
    mask = generator.random(7) < 0.8
    got = two_passes(Priority(order), capacity)(group(logits.astype(np.float32), mask=mask))
    expected = slow_two_passes(logits, mask, 2, capacity, by_rank=order == "choice")
    np.testing.assert_array_equal(got.position_in_expert, expected[1])
    np.testing.assert_array_equal(got.experts, expected[0])


# What holds for every router under every priority order.

ALL_LOSSES = Losses(**dict.fromkeys(Losses.__dataclass_fields__, 1))
ROUTERS = {
    "switch": functools.partial(TopK, k=1),
    "deepseek_moe": functools.partial(TopK, k=2),
    "mixtral": functools.partial(TopK, k=2, renormalize=True),
    "sample": functools.partial(TopK, k=2, exploration=Exploration.SAMPLE),
    "second_pass": functools.partial(TopK, k=2, no_token_left_behind=True),
    "gshard": GShard,
    "top_3": functools.partial(GShard, k=3, later_choices=LaterChoices.THRESHOLD),
    "vmoe": VMoE,
}
every_router = pytest.mark.parametrize("name", ROUTERS)


def check_invariants(name, routing, mask, num_experts, capacity):
    """What any routing of one group owes, whatever was put in."""
    assignment = jax.tree.map(np.asarray, routing.assignment)
    experts, slots, gates = assignment.experts, assignment.position_in_expert, assignment.gates
    assert ((experts >= 0) & (experts <= num_experts)).all()
    assert ((slots >= 0) & (slots <= capacity)).all()
    served = slots < capacity
    assert not served[~mask].any(), "padding took a slot"
    assert not served[experts == num_experts].any(), "no choice took a slot"
    places = list(zip(experts[served], slots[served], strict=True))
    assert len(set(places)) == len(places), "two tokens in one slot"
    assert np.bincount(experts[served], minlength=num_experts).max() <= capacity
    for row in experts:
        chosen = row[row < num_experts]
        assert len(set(chosen)) == len(chosen), "a token chose an expert twice"
    if capacity == len(mask):
        assert served[mask][experts[mask] < num_experts].all(), "dropped in spite of room"
    p = np.asarray(routing.probabilities)
    np.testing.assert_allclose(p.sum(axis=1), 1, rtol=1e-5)
    raw = np.take_along_axis(p, np.minimum(experts, num_experts - 1), axis=1)
    sums = gates.sum(axis=1)
    if name in ("mixtral", "gshard", "top_3"):
        complete = (experts < num_experts).all(axis=1)
        np.testing.assert_allclose(sums[complete], 1, rtol=1e-5)
        assert (sums <= 1 + 1e-5).all()
        assert (gates[experts == num_experts] == 0).all()
    else:
        np.testing.assert_allclose(gates, raw, rtol=1e-5)
    for mean in (*routing.losses.values(), *routing.statistics.values()):
        assert np.isfinite(mean.value()).all()
    if not mask.any():
        assert all(mean.count == 0 for mean in routing.losses.values())
        assert all(not np.any(mean.value()) for mean in routing.statistics.values())


@functools.cache
def routed_twice(name, order):
    """Two versions of one group, side by side as two groups of a batch."""
    router = ROUTERS[name](order=order)
    if order == ROUTERS[name]().order:  # Losses do not depend on who is served; compiling does.
        router.losses = ALL_LOSSES
    parameters = {"weights": jnp.eye(E)}
    return jax.jit(jax.vmap(lambda inputs: router.route(parameters, inputs, E, 2)))


@every_router
@pytest.mark.parametrize("order", Priority)
@given(
    seed=st.integers(0, 2**32 - 1), scale=st.sampled_from([0.0, 1.0, 9.0]), real=st.integers(0, 8)
)
@settings(max_examples=8, deadline=None)
def test_routing_keeps_its_promises_and_ignores_padding(name, order, seed, scale, real):
    generator = np.random.default_rng(seed)
    mask = generator.permutation(8) < real
    x = (scale * generator.normal(size=(8, E))).astype(np.float32)
    if scale == 9.0:
        x[:, 3] += 40  # All to one expert.
    other = np.where(mask[:, None], x, generator.normal(size=(8, E)) * 30).astype(np.float32)
    versions = jax.tree.map(
        lambda *leaves: jnp.stack(leaves),
        *(
            group(v, mask=mask, seed=seed % 1000, sequence_ids=np.arange(8) // 3)
            for v in (x, other)
        ),
    )
    both = routed_twice(name, order)(versions)
    one, two = (jax.tree.map(lambda leaf, i=i: np.asarray(leaf[i]), both) for i in (0, 1))
    check_invariants(name, one, mask, E, 2)
    np.testing.assert_array_equal(
        one.assignment.position_in_expert, two.assignment.position_in_expert
    )
    for field in ("experts", "gates"):
        np.testing.assert_array_equal(
            getattr(one.assignment, field)[mask], getattr(two.assignment, field)[mask]
        )
    for first, second in ((one.losses, two.losses), (one.statistics, two.statistics)):
        jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize(
    ("tokens", "num_experts", "choices", "capacity"),
    [
        (1, 4, 2, 1),  # One token.
        (6, 1, 1, 2),  # One expert.
        (9, 7, 3, 9),  # E is not a power of two, and there is room for all.
        (3, 8, 2, 1),  # S K / E < 1.
    ],
)
@pytest.mark.parametrize("name", ["mixtral", "gshard", "vmoe"])
def test_unusual_sizes(name, tokens, num_experts, choices, capacity):
    losses = dataclasses.replace(ALL_LOSSES, device_level=0.0, communication=0.0)
    router = ROUTERS[name](k=choices, losses=losses)
    router.validate(num_experts)
    inputs = group(vectors(tokens), sequence_ids=np.arange(tokens) // 2)
    parameters = router.init(jax.random.key(2), 8, num_experts)

    def total(parameters, inputs):
        routing = router.route(parameters, inputs, num_experts, capacity)
        return sum(mean.value() for mean in routing.losses.values()), routing

    gradient, routing = jax.jit(jax.grad(total, has_aux=True))(parameters, inputs)
    check_invariants(name, routing, np.ones(tokens, bool), num_experts, capacity)
    assert jnp.isfinite(gradient["weights"]).all()


@every_router
def test_gradients_are_finite_at_balance_and_for_groups_of_padding(name):
    router = ROUTERS[name](losses=ALL_LOSSES)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradient(weights, x, mask):
        routing = router.route({"weights": weights}, group(x, mask=mask), E, 2)
        total = sum(mean.total for mean in routing.losses.values())
        return total + ((routing.assignment.gates * mask[:, None]) ** 2).sum()

    some, none = jnp.arange(6) != 2, jnp.zeros(6, bool)
    x, weights = vectors(6, D), jax.random.normal(jax.random.key(1), (D, E))
    for case in ((0 * weights, x, some), (weights, 0 * x, some), (weights, 1e3 * x, some)):
        assert all(jnp.isfinite(leaf).all() for leaf in gradient(*case))
    assert any(leaf.any() for leaf in gradient(weights, x, some))
    for leaf in gradient(weights, x, none):
        np.testing.assert_array_equal(leaf, 0)


@pytest.mark.parametrize("name", ["switch", "mixtral", "gshard", "vmoe"])
def test_gradients_equal_finite_differences(name):
    # Logits far from each other, so that no small step changes a choice.
    router = ROUTERS[name](losses=ALL_LOSSES)
    base = np.array([[0.0, 1.0, 2.0, 3.2], [2.5, 0.5, 1.5, 0.0], [1.0, 3.0, 0.0, 2.0]], np.float32)

    @jax.jit
    def total(weights, x):
        routing = router.route({"weights": weights}, group(x, seed=1), 4, 3)
        scores = sum(mean.value() for mean in routing.losses.values())
        gates = routing.assignment.gates
        return scores + (gates * jnp.arange(1.0, 1 + gates.size).reshape(gates.shape)).sum()

    check_grads(total, (jnp.eye(4), base), order=1, modes=["rev"], eps=1e-2, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("name", ["gshard", "vmoe"])
def test_groups_side_by_side_equal_groups_alone(name, parameters):
    router = ROUTERS[name](losses=ALL_LOSSES)
    groups = [
        group(vectors(S, D, seed), seed=seed, mask=mask)
        for seed, mask in enumerate([np.ones(S, bool), np.zeros(S, bool), np.arange(S) < 7])
    ]

    def run(inputs):
        return router.route(parameters, inputs, E, 3)

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *groups)
    together, alone = jax.jit(jax.vmap(run))(stacked), jax.jit(run)
    for i, one in enumerate(groups):
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-6),
            together,
            alone(one),
        )


def test_padding_enters_nothing(x, parameters):
    # A group with padding in it equals the group of its real tokens.
    mask = np.arange(S) % 3 != 1
    router = TopK(k=2, losses=ALL_LOSSES)
    padded = route(router, parameters, group(x, mask=mask), capacity=2)
    alone = route(router, parameters, group(x[mask]), capacity=2)
    for name in ("experts", "position_in_expert", "gates"):
        np.testing.assert_allclose(
            getattr(padded.assignment, name)[mask], getattr(alone.assignment, name), rtol=1e-6
        )
    assert (padded.assignment.position_in_expert[~mask] == 2).all()
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
        route(router, parameters, group(value), capacity=capacity).assignment
        for value in (x, changed)
    )
    assert (before.position_in_expert[:t] == capacity).any() == (capacity < S)
    for name in ("experts", "position_in_expert", "gates"):
        np.testing.assert_array_equal(getattr(before, name)[:t], getattr(after, name)[:t])
    assert (before.experts[t] != after.experts[t]).any()


def test_a_router_says_what_its_order_leaks():
    assert TopK(k=2).leak is None
    assert TopK(k=1, order=Priority.CHOICE).leak is None
    assert GShard().leak == priority.LEAKS[Priority.CHOICE]
    assert VMoE(k=1, order=Priority.BATCH_PRIORITY).leak is not None
    assert "second pass" in TopK(no_token_left_behind=True).leak


def test_probabilities_are_for_study_and_have_no_gradient(x, parameters):
    def total(weights):
        return route(TopK(), {"weights": weights}, group(x)).probabilities[:, 0].sum()

    assert not jax.grad(total)(parameters["weights"]).any()


def test_loss_coefficients_name_the_losses(x, parameters):
    router = TopK(losses=Losses(load_balancing=0.5, router_z=0.25))
    routing = route(router, parameters, group(x))
    assert router.loss_coefficients == {"load_balancing": 0.5, "router_z": 0.25}
    assert routing.losses.keys() == router.loss_coefficients.keys()
    assert VMoE().loss_coefficients == {"importance": 0.005, "load": 0.005}


def test_every_loss_is_computed_from_what_it_is_defined_on(x, parameters):
    ids, everything = np.arange(S) // 5, jnp.ones(S, bool)
    wanted = Losses(**(ALL_LOSSES.coefficients | {"devices": 5, "devices_per_token": 2}))
    routing = route(TopK(k=2, losses=wanted), parameters, group(x, sequence_ids=ids))
    logits = x @ parameters["weights"]
    p, experts = jax.nn.softmax(logits), routing.assignment.experts
    expected = {
        "load_balancing": losses.load_balancing(p, experts, everything),
        "load_balancing_all_choices": losses.load_balancing_all_choices(p, experts, everything),
        "expert_level": losses.expert_level(p, experts, everything),
        "device_level": losses.device_level(p, experts, everything, 5),
        "communication": losses.communication(p, experts, everything, 5, 2),
        "sequence_wise": losses.sequence_wise(p, experts, everything, jnp.asarray(ids)),
        "importance": losses.importance(p, everything),
        "router_z": losses.router_z(logits, everything),
    }
    assert routing.losses.keys() == expected.keys()
    for name, mean in routing.losses.items():
        np.testing.assert_allclose(mean.value(), expected[name].value(), rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("exploration", [Exploration.JITTER, Exploration.INPUT_DROPOUT])
def test_the_importance_loss_sees_no_exploration_noise(exploration, x, parameters):
    router = TopK(
        exploration=exploration,
        exploration_rate=0.5,
        losses=Losses(importance=1.0, load_balancing=1.0),
    )
    noisy = route(router, parameters, group(x))
    still = route(router, parameters, group(x, train=False))
    assert noisy.losses["importance"].value() == pytest.approx(
        float(still.losses["importance"].value()), rel=1e-6
    )
    assert noisy.losses["load_balancing"].value() != still.losses["load_balancing"].value()


def test_weights_begin_with_the_deviation_asked_for():
    for router in (TopK(init_deviation=0.125), BASE(init_deviation=0.125)):
        weights = router.init(jax.random.key(0), 64, 100)["weights"]
        assert weights.std() == pytest.approx(0.125, rel=0.05)
    assert TopK().init(jax.random.key(0), 64, 100)["weights"].std() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize(
    ("router", "message"),
    [
        (TopK(k=6), r"router.k is 6 but there are 5 experts; choose k between 1"),
        (TopK(k=0), r"router.k is 0 but there are 5 experts; choose k between 1"),
        (TopK(gate_scale=0.0), r"router.gate_scale is 0.0; it must be above 0"),
        (
            TopK(init_deviation=0.0),
            r"router.init_deviation is 0.0; it must be above 0, such as 0.02",
        ),
        (TopK(exploration_rate=1.0), r"router.exploration_rate is 1.0; it must be in \[0, 1\)"),
        (TopK(exploration_rate=-0.1), r"router.exploration_rate is -0.1; it must be in \[0, 1\)"),
        (TopK(exploration=Exploration.JITTER), r"router.exploration=jitter does nothing"),
        (TopK(logit_soft_cap=-1.0), r"router.logit_soft_cap is -1.0; it must be above 0, or 0 for"),
        (TopK(losses=Losses(router_z=-1.0)), r"router.losses.router_z is -1.0"),
        (TopK(k=3, no_token_left_behind=True), r"needs 3 further experts for 3 choices, but there"),
        (GShard(threshold=0.0), r"router.threshold is 0.0; it must be in \(0, 1\]"),
        (GShard(threshold=1.5), r"router.threshold is 1.5; it must be in \(0, 1\]"),
        (
            GShard(evaluation_later_choices=LaterChoices.RANDOM),
            r"router.evaluation_later_choices is random, but evaluation draws nothing",
        ),
        (VMoE(load_weight=-0.1), r"router.load_weight is -0.1; a coefficient is at least 0"),
        (VMoE(noise=-1.0), r"router.noise is -1.0; it must be at least 0"),
        (
            VMoE(noise=0.0),
            r"router.noise is 0, where the load loss is not defined; set router.load",
        ),
    ],
)
def test_bad_fields_are_named(router, message):
    with pytest.raises(UserError, match=message):
        router.validate(E)


@every_router
def test_defaults_pass(name):
    ROUTERS[name]().validate(E)
