"""Numbers that the papers state and that need no training."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.routing import losses, statistics, study
from moe_jax.routing.router import Routing, TokenAssignment


def uniform(num_experts, choices):
    """A perfectly balanced group of E tokens: uniform probabilities, every expert chosen K times."""
    experts = (np.arange(num_experts)[:, None] + np.arange(choices)) % num_experts
    p = jnp.full((num_experts, num_experts), 1 / num_experts)
    return p, jnp.asarray(experts), jnp.ones(num_experts, bool)


@pytest.mark.parametrize("num_experts", [2, 7, 64])
def test_switch_loss_of_uniform_routing_is_one(num_experts):
    # Switch section 2.2: N * sum f_i P_i = N * N / N^2.
    got = losses.load_balancing(*uniform(num_experts, 1)).value()
    assert got == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("num_experts", [2, 7, 64])
def test_gshard_loss_of_uniform_routing_is_one_over_e_squared(num_experts):
    p, experts, mask = uniform(num_experts, 2)
    # Algorithm 1: (1/E) sum_e (c_e / S) m_e, where c_e counts first choices.
    counts = np.bincount(np.asarray(experts[:, 0]), minlength=num_experts)
    gshard = sum(c / num_experts * float(m) for c, m in zip(counts, p.mean(axis=0), strict=True))
    gshard /= num_experts
    assert gshard == pytest.approx(1 / num_experts**2, rel=1e-5)
    switch = losses.load_balancing(p, experts, mask).value()
    assert switch == pytest.approx(num_experts**2 * gshard, rel=1e-5)


@pytest.mark.parametrize(("num_experts", "choices"), [(8, 2), (64, 6), (7, 3)])
def test_deepseek_losses_of_uniform_routing_are_their_coefficients(num_experts, choices):
    p, experts, mask = uniform(num_experts, choices)
    alpha = 0.003
    assert alpha * losses.expert_level(p, experts, mask).value() == pytest.approx(alpha, rel=1e-5)
    devices = losses.device_level(p, experts, mask, 1 if num_experts == 7 else 8)
    assert alpha * devices.value() == pytest.approx(alpha, rel=1e-5)


def test_largest_entropy_over_32_experts():
    # ST-MoE Table 14: 3.5 for the uniform distribution.
    got = statistics.entropy(jnp.full(32, 1 / 32))
    assert got == pytest.approx(math.log(32), rel=1e-6)
    assert round(float(got), 1) == 3.5


def sets_of(num_experts, choices):
    return np.array(list(itertools.combinations(range(num_experts), choices)), np.int32)


def tallied(pairs, num_experts):
    """The statistics of two-token sequences with these experts [pairs, 2, K]."""
    count, _, choices = pairs.shape
    shape = (count, 2)
    position = jnp.broadcast_to(jnp.arange(2), shape)
    tokens = study.RoutedTokens(
        jnp.ones(shape, bool), position, position, jnp.zeros(shape, jnp.int32), position
    )
    assignment = TokenAssignment(
        jnp.asarray(pairs), jnp.zeros(pairs.shape, jnp.int32), jnp.ones(pairs.shape) / choices, 1
    )
    uniform = jnp.full((*shape, num_experts), 1 / num_experts)
    sums = study.tally(Routing(assignment, uniform, {}, {}), tokens, num_labels=2, length=2)
    return study.summarize(sums)


def test_random_routing_repeats_the_expert_of_the_last_token():
    # Mixtral Table 5: 12.5% for the first choice, 46% for either of two choices. All pairs of
    # choices are equally likely, so their mean is the expectation.
    first, either = (
        tallied(np.array(list(itertools.product(sets, sets))), 8)
        for sets in (sets_of(8, 1), sets_of(8, 2))
    )
    assert first["repeat_first"] == 0.125
    assert either["repeat_any"] == pytest.approx(1 - 6 / 8 * 5 / 7)
    assert round(100 * either["repeat_any"]) == 46


@pytest.mark.parametrize(("choices", "published"), [(1, 1.6), (8, 12.5)])
def test_random_routing_is_saturated_by_chance(choices, published):
    # OLMoE's router saturation with 64 experts. A fixed set against all its 64 rotations, in which
    # every expert is equally often, has the expected overlap of two random sets.
    rotations = (np.arange(choices) + np.arange(64)[:, None]) % 64
    fixed = np.broadcast_to(np.arange(choices), rotations.shape)
    mean = study.saturation(jnp.asarray(fixed), jnp.asarray(rotations), jnp.ones(64, bool), 64)
    assert mean.value() == pytest.approx(choices / 64, rel=1e-6)
    assert round(100 * float(mean.value()), 1) == published


@pytest.mark.parametrize(
    ("start", "spacing"),
    # ST-MoE Figure 2, which rounds the first to 0.01563.
    [(2.0, 0.015625), (32.0, 0.25), (1024.0, 8.0), (2.0**20, 8192.0)],
)
def test_bfloat16_numbers_are_this_far_apart(start, spacing):
    for value in (start, 1.5 * start):
        narrow = jnp.asarray(value, jnp.bfloat16)
        following = jnp.nextafter(narrow, jnp.asarray(jnp.inf, jnp.bfloat16))
        assert float(following) - float(narrow) == spacing
    # What lies between is rounded away, and the next binade is coarser.
    assert float(jnp.asarray(start + 0.49 * spacing, jnp.bfloat16)) == start
    last = jnp.asarray(2 * start, jnp.bfloat16)
    assert float(jnp.nextafter(last, jnp.asarray(jnp.inf, jnp.bfloat16)) - last) == 2 * spacing


def test_softmax_of_128_and_a_half_loses_a_third_in_bfloat16():
    # ST-MoE: one logit of 128.5 among ten of 128. bfloat16 has no 128.5.
    logits = jnp.array([128.5] + [128.0] * 10)
    exact = float(jax.nn.softmax(logits)[0])
    rounded = float(jax.nn.softmax(logits.astype(jnp.bfloat16).astype(jnp.float32))[0])
    assert (round(exact, 3), round(rounded, 3)) == (0.142, 0.091)
    assert round(100 * (exact - rounded) / exact) == 36
