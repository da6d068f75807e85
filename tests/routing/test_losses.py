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
from moe_jax.routing.losses import Losses

# Every loss under one signature, so that a claim about all of them is one test. The importance and
# load losses read probabilities or logits only.
DEVICES, PER_TOKEN, DEVIATION = 2, 2, 0.5
LOSSES = {
    "load_balancing": lambda c: losses.load_balancing(c["p"], c["experts"], c["mask"]),
    "load_balancing_all_choices": lambda c: losses.load_balancing_all_choices(
        c["p"], c["experts"], c["mask"]
    ),
    "expert_level": lambda c: losses.expert_level(c["p"], c["experts"], c["mask"]),
    "device_level": lambda c: losses.device_level(c["p"], c["experts"], c["mask"], DEVICES),
    "communication": lambda c: losses.communication(
        c["p"], c["experts"], c["mask"], DEVICES, PER_TOKEN
    ),
    "sequence_wise": lambda c: losses.sequence_wise(
        c["p"], c["experts"], c["mask"], c["sequence_ids"]
    ),
    "importance": lambda c: losses.importance(c["p"], c["mask"]),
    "load": lambda c: losses.load(c["logits"], c["threshold"], DEVIATION, c["mask"]),
    "router_z": lambda c: losses.router_z(c["logits"], c["mask"]),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


@functools.cache
def jitted(name):
    return jax.jit(LOSSES[name])


def case(p, experts, *, logits=None, threshold=None, mask=None, sequence_ids=None):
    """What the losses of one group read; everything but the first two has a default."""
    p = jnp.asarray(p, jnp.float32)
    count = len(p)
    return {
        "p": p,
        "experts": jnp.asarray(experts, jnp.int32),
        "logits": jnp.log(p) if logits is None else jnp.asarray(logits, jnp.float32),
        "threshold": jnp.asarray(
            np.zeros((count, 1)) if threshold is None else threshold, jnp.float32
        ),
        "mask": jnp.asarray(np.ones(count, bool) if mask is None else mask),
        "sequence_ids": jnp.asarray(
            np.zeros(count) if sequence_ids is None else sequence_ids, jnp.int32
        ),
    }


def padded(c, count):
    """The same group with `count` tokens of padding, which hold other numbers, behind it."""

    def more(name, value):
        if name == "mask":
            return jnp.zeros(count, bool)
        if name in ("experts", "sequence_ids"):
            return value[-count:]
        return jnp.full((count, *value.shape[1:]), 7.0)

    return {name: jnp.concatenate([value, more(name, value)]) for name, value in c.items()}


# Three tokens, three experts, two choices.
#   f of first choices [2/3, 0, 1/3]; of all choices [3, 1, 2] / 3; P = [1.3, 0.6, 1.1] / 3.
THREE = case(
    p=[[0.5, 0.3, 0.2], [0.6, 0.1, 0.3], [0.2, 0.2, 0.6]],
    experts=[[0, 1], [0, 2], [2, 0]],
    # logsumexp is ln 8, ln 3, ln 8.
    logits=np.log([[1.0, 2.0, 5.0], [1.0, 1.0, 1.0], [2.0, 2.0, 4.0]]),
    sequence_ids=[4, 4, 9],
)
# Four experts on two devices. Counts [3, 2, 0, 1], f = 4 / 6 of them, P' = [0.6, 0.4].
FOUR = case(
    p=[[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1]],
    experts=[[0, 1], [3, 0], [0, 1]],
)
# In units of the deviation 0.5 the logits are [0, -1, 1], [1, 0, -1], [1, 1, 0] above the threshold;
# Phi(1) = 0.8413447, so the experts' expected loads are [2.1826895, 1.5, 1.5] / 3.
NOISY = case(
    p=np.full((3, 3), 1 / 3),
    experts=[[0, 1]] * 3,
    logits=[[0.0, -0.5, 0.5], [1.5, 1.0, 0.5], [-0.5, -0.5, -1.0]],
    threshold=[[0.0], [1.0], [-1.0]],
)
BY_HAND = {
    # 3 * (2/3 * 1.3/3 + 1/3 * 1.1/3) = 3.7 / 3
    "load_balancing": (THREE, 1.2333333),
    # 3 * (1 * 1.3/3 + 1/3 * 0.6/3 + 2/3 * 1.1/3) = 6.7 / 3
    "load_balancing_all_choices": (THREE, 2.2333333),
    # The same with f over K = 2.
    "expert_level": (THREE, 1.1166667),
    # f' = [(2 + 4/3) / 2, (0 + 2/3) / 2] = [5/3, 1/3]; 5/3 * 0.6 + 1/3 * 0.4
    "device_level": (FOUR, 1.1333333),
    # Tokens sent [3, 1], f'' = 2 / (2 * 3) of them = [1, 1/3]; 0.6 + 0.4 / 3
    "communication": (FOUR, 0.7333333),
    # First sequence: f = 3/4 [2, 1, 1], P = [0.55, 0.2, 0.25]: 0.825 + 0.15 + 0.1875 = 1.1625.
    # Second: f = 3/2 [1, 0, 1], P = [0.2, 0.2, 0.6]: 1.2. The mean of the two.
    "sequence_wise": (THREE, 1.18125),
    # Sums [1.3, 0.6, 1.1], mean 1, variance (0.09 + 0.16 + 0.01) / 3.
    "importance": (THREE, 0.0866667),
    # Mean 1.7275632, variance 2/9 * 0.6826895^2.
    "load": (NOISY, 0.0347029),
    # (ln 8)^2 = 4.3240771 twice, (ln 3)^2 = 1.2069490 once; a mean.
    "router_z": (THREE, 3.2850344),
}


@every_loss
def test_value_worked_out_by_hand(name):
    c, expected = BY_HAND[name]
    assert jitted(name)(c).value() == pytest.approx(expected, rel=2e-6)


@every_loss
def test_padding_changes_nothing(name):
    c, expected = BY_HAND[name]
    assert jitted(name)(padded(c, 2)).value() == pytest.approx(expected, rel=2e-6)


# The formulas as loops.


def slow_counts(c, tokens, num_experts, columns):
    counts = [0] * num_experts
    for s in tokens:
        for e in c["experts"][s][:columns]:
            if e < num_experts:
                counts[e] += 1
    return counts


def slow_mean_probability(c, tokens, num_experts):
    return [sum(float(c["p"][s][e]) for s in tokens) / len(tokens) for e in range(num_experts)]


def slow_expert_level(c, tokens, num_experts):
    choices = len(c["experts"][0])
    counts = slow_counts(c, tokens, num_experts, choices)
    mean = slow_mean_probability(c, tokens, num_experts)
    total = 0.0
    for e in range(num_experts):
        total += num_experts / (choices * len(tokens)) * counts[e] * mean[e]
    return total


def slow_variation(values):
    mean = sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values) / len(values) / mean**2


def slow(name, c):
    """(sum, count) of a loss whose group has a real token."""
    c = {key: np.asarray(value) for key, value in c.items()}
    tokens = [s for s, real in enumerate(c["mask"]) if real]
    count, num_experts = len(tokens), c["p"].shape[1]
    size = num_experts // DEVICES
    mean = slow_mean_probability(c, tokens, num_experts)
    match name:
        case "load_balancing" | "load_balancing_all_choices":
            columns = 1 if name == "load_balancing" else None
            counts = slow_counts(c, tokens, num_experts, columns)
            return num_experts * sum(n / count * p for n, p in zip(counts, mean, strict=True)), 1
        case "expert_level":
            return slow_expert_level(c, tokens, num_experts), 1
        case "device_level":
            choices = c["experts"].shape[1]
            counts = slow_counts(c, tokens, num_experts, choices)
            total = 0.0
            for i in range(DEVICES):
                here = range(i * size, (i + 1) * size)
                f = sum(num_experts / (choices * count) * counts[e] for e in here) / size
                total += f * sum(mean[e] for e in here)
            return total, 1
        case "communication":
            total = 0.0
            for i in range(DEVICES):
                here = range(i * size, (i + 1) * size)
                sent = sum(any(e in here for e in c["experts"][s]) for s in tokens)
                f = DEVICES / (PER_TOKEN * count) * sent
                total += f * sum(mean[e] for e in here)
            return total, 1
        case "sequence_wise":
            names = sorted({int(c["sequence_ids"][s]) for s in tokens})
            total = 0.0
            for name_ in names:
                own = [s for s in tokens if c["sequence_ids"][s] == name_]
                total += slow_expert_level(c, own, num_experts)
            return total, len(names)
        case "importance":
            return slow_variation([m * count for m in mean]), 1
        case "load":
            chance = [
                sum(
                    0.5 * (1 + math.erf((row[e] - threshold[0]) / DEVIATION / math.sqrt(2)))
                    for row, threshold in (
                        (c["logits"][s].tolist(), c["threshold"][s].tolist()) for s in tokens
                    )
                )
                for e in range(num_experts)
            ]
            return slow_variation(chance), 1
    total = sum(math.log(sum(math.exp(v) for v in c["logits"][s])) ** 2 for s in tokens)
    return total, count


S, K, E = 8, 2, 6


@st.composite
def groups(draw):
    """A group of S tokens with padding anywhere, some tokens with one choice only."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = generator.normal(size=(S, E)) * draw(st.sampled_from([0.1, 1.0, 3.0]))
    experts = np.argsort(-logits, axis=1)[:, :K]
    experts[generator.random(S) < 0.2, 1] = E
    mask = np.array(draw(st.lists(st.booleans(), min_size=S, max_size=S)))
    if not mask.any():
        mask[0] = True
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return case(
        p,
        experts,
        logits=logits,
        threshold=np.sort(logits, axis=1)[:, -K : -K + 1] + 0.1,
        mask=mask,
        sequence_ids=np.cumsum(generator.random(S) < 0.3),
    )


@every_loss
@given(c=groups())
@settings(max_examples=20, deadline=None)
def test_equals_the_formula_as_a_loop(name, c):
    got = jitted(name)(c)
    total, count = slow(name, c)
    assert got.count == count
    assert got.total == pytest.approx(total, rel=2e-5, abs=1e-6)
    assert got.total.dtype == got.count.dtype == jnp.float32


# What the docstrings state: at perfect balance, every expert chosen by as many tokens and every
# token sent to two devices, each token sure of its own two experts.
BALANCED_EXPERTS = np.array([[0, 2], [1, 3], [2, 0], [3, 1]])
BALANCED = case(
    p=np.array([[0.5 * (e in row) for e in range(4)] for row in BALANCED_EXPERTS]),
    experts=BALANCED_EXPERTS,
    logits=np.zeros((4, 4)),
    sequence_ids=[0, 0, 1, 1],
)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("load_balancing", 1.0),
        ("load_balancing_all_choices", 2.0),  # K.
        ("expert_level", 1.0),
        ("device_level", 1.0),
        ("communication", 1.0),
        ("sequence_wise", 1.0),
        ("importance", 0.0),
        ("load", 0.0),
        ("router_z", math.log(4) ** 2),
    ],
)
def test_value_at_perfect_balance(name, expected):
    assert jitted(name)(BALANCED).value() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("load_balancing", 4.0),  # E.
        ("load_balancing_all_choices", 4.0),  # Two experts chosen always, one probable.
        ("expert_level", 2.0),  # E / K.
        ("importance", 3.0),  # E - 1.
    ],
)
def test_value_at_collapse(name, expected):
    collapsed = case(p=np.tile([1.0, 0.0, 0.0, 0.0], (5, 1)), experts=[[0, 1]] * 5)
    assert LOSSES[name](collapsed).value() == pytest.approx(expected, rel=1e-6)


@every_loss
def test_gradient_equals_finite_differences(name):
    c, _ = BY_HAND[name]

    def loss(p, logits, threshold):
        return jitted(name)(c | {"p": p, "logits": logits, "threshold": threshold}).value()

    arguments = (c["p"], c["logits"], c["threshold"])
    check_grads(loss, arguments, order=1, modes=["rev"], eps=1e-2, atol=2e-3, rtol=2e-3)


def gradients(name, c, of=("p", "logits", "threshold")):
    def loss(moved):
        return jitted(name)(c | moved).total

    return jax.grad(loss)({key: c[key] for key in of})


@every_loss
def test_a_group_of_padding_has_no_loss_no_count_and_no_gradient(name):
    c, _ = BY_HAND[name]
    nothing = c | {"mask": jnp.zeros_like(c["mask"])}
    mean = jitted(name)(nothing)
    assert (mean.total, mean.count, mean.value()) == (0, 0, 0)
    for gradient in gradients(name, nothing).values():
        np.testing.assert_array_equal(gradient, 0)


@every_loss
def test_padding_gets_no_gradient(name):
    c, _ = BY_HAND[name]
    for gradient in gradients(name, padded(c, 2)).values():
        np.testing.assert_array_equal(gradient[-2:], 0)


@every_loss
def test_gradient_at_exact_balance_is_finite(name):
    for gradient in gradients(name, BALANCED).values():
        assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize(
    "name",
    ["load_balancing", "load_balancing_all_choices", "expert_level", "sequence_wise", "importance"],
)
def test_gradient_of_a_router_that_knows_nothing_is_zero(name):
    # Equal logits and equal counts: no direction makes the balance better.
    def loss(logits):
        return LOSSES[name](BALANCED | {"p": jax.nn.softmax(logits)}).value()

    np.testing.assert_allclose(jax.grad(loss)(jnp.zeros((4, 4))), 0, atol=1e-7)


def test_the_gradient_of_the_load_is_zero_where_loads_are_equal():
    np.testing.assert_array_equal(gradients("load", BALANCED)["logits"], 0)


# [4, 3] gates that the tests of google-research/vmoe use; first choices [0, 2, 2, 0].
PUBLISHED = jnp.array([[0.5, 0.4, 0.1], [0.3, 0.3, 0.4], [0.1, 0.2, 0.7], [0.8, 0.2, 0.0]])
PUBLISHED_FIRST = jnp.array([[0], [2], [2], [0]])
EVERYTHING = jnp.ones(4, bool)


def test_load_balancing_published_value():
    # f = [1/2, 0, 1/2], P = [0.425, 0.275, 0.3], 3 * (0.2125 + 0.15).
    got = losses.load_balancing(PUBLISHED, PUBLISHED_FIRST, EVERYTHING)
    assert got.value() == pytest.approx(1.0875, abs=1e-6)


def test_importance_published_value():
    assert losses.importance(PUBLISHED, EVERYTHING).value() == pytest.approx(0.03875, abs=1e-6)


def test_load_published_value():
    # The published noise is already times the deviation 0.1; scaled again it would give 0.2237.
    logits = jnp.array([[0.9, 0.06, 0.04], [0.7, 0.18, 0.12], [0.85, 0.05, 0.1]])
    noise = jnp.array([[-0.037, 0.026, -0.018], [-0.074, 0.045, -0.015], [-0.067, -0.059, 0.073]])
    second = jnp.sort(logits + noise, axis=1)[:, -2:-1]
    got = losses.load(logits, second, 0.1, jnp.ones(3, bool))
    assert got.value() == pytest.approx(0.48573865, abs=1e-6)


def test_load_balancing_counts_first_choices_only():
    both = jnp.concatenate([PUBLISHED_FIRST, jnp.array([[1], [0], [1], [1]])], axis=1)
    one, two = (
        losses.load_balancing(PUBLISHED, experts, EVERYTHING).value()
        for experts in (PUBLISHED_FIRST, both)
    )
    assert one == two


def test_load_balancing_gradient_is_that_of_the_probabilities_alone():
    def loss(p):
        first = jnp.argmax(p, axis=1, keepdims=True)
        return losses.load_balancing(p, first, EVERYTHING).value()

    # E * f_e / S for every token: f carries no gradient.
    expected = np.tile([3 * 0.5 / 4, 0, 3 * 0.5 / 4], (4, 1))
    np.testing.assert_allclose(jax.grad(loss)(PUBLISHED), expected, rtol=1e-6)


def test_all_choices_are_k_times_expert_level():
    c, _ = BY_HAND["expert_level"]
    assert jitted("load_balancing_all_choices")(c).value() == pytest.approx(
        2 * float(jitted("expert_level")(c).value())
    )


def test_one_device_per_expert_is_expert_level_and_one_device_is_one():
    c, _ = BY_HAND["device_level"]
    each = losses.device_level(c["p"], c["experts"], c["mask"], 4)
    assert each.value() == pytest.approx(float(jitted("expert_level")(c).value()), rel=1e-6)
    assert losses.device_level(c["p"], c["experts"], c["mask"], 1).value() == pytest.approx(1)


def test_groups_weigh_alike_but_sequences_and_tokens_weigh_each():
    # Two groups: one of three tokens and one of a single real token, as the trainer adds them.
    two = jax.tree.map(
        lambda a, b: jnp.stack([a, b]), THREE, THREE | {"mask": jnp.array([False, False, True])}
    )
    counts = {
        name: jax.vmap(LOSSES[name])(two).count.sum()
        for name in ("load_balancing", "importance", "sequence_wise", "router_z")
    }
    assert counts == {"load_balancing": 2, "importance": 2, "sequence_wise": 3, "router_z": 4}


def test_sequence_wise_cut_by_padding_counts_only_real_sequences():
    # The second sequence is padding only.
    c = THREE | {"mask": jnp.array([True, True, False])}
    got = jitted("sequence_wise")(c)
    assert got.count == 1
    assert got.value() == pytest.approx(1.1625, rel=1e-6)


def test_coefficients_name_the_losses_that_are_on():
    assert Losses().coefficients == {}
    assert Losses(importance=0.5, router_z=0.25, devices=4).coefficients == {
        "importance": 0.5,
        "router_z": 0.25,
    }


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (Losses(router_z=-1.0), r"router.losses.router_z is -1.0; a coefficient is at least 0\."),
        (Losses(load_balancing=math.nan), "router.losses.load_balancing is nan"),
        (Losses(devices=4), "router.losses.devices is 4, which does not divide the 6 experts"),
        (Losses(devices=0), "router.losses.devices is 0, which does not divide the 6 experts"),
        (Losses(devices=3, devices_per_token=4), "devices_per_token is 4; it must be between 1"),
        (Losses(devices_per_token=0), "devices_per_token is 0; it must be between 1"),
    ],
)
def test_bad_coefficients_are_named(bad, message):
    with pytest.raises(UserError, match=message):
        bad.validate(6)


def test_good_coefficients_pass():
    Losses(device_level=0.05, communication=0.02, devices=3, devices_per_token=2).validate(6)
