import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.routing import statistics
from moe_jax.routing.router import ExpertAssignment, SoftAssignment, TokenAssignment


@functools.partial(jax.jit, static_argnames="capacity")
def of_tokens(logits, wanted, slots, capacity, mask):
    """Statistics of a group in which nobody was rerouted."""
    wanted, slots = jnp.asarray(wanted, jnp.int32), jnp.asarray(slots, jnp.int32)
    assignment = TokenAssignment(wanted, slots, jnp.ones(wanted.shape), capacity)
    return statistics.of_token_choice(
        assignment, wanted, logits, jax.nn.softmax(logits), jnp.asarray(mask)
    )


def test_token_choice_by_hand():
    # Token 2 lost its second choice, token 3 is padding.
    result = of_tokens(
        jnp.zeros((4, 3)),
        [[0, 1], [0, 2], [1, 0], [2, 1]],
        [[0, 0], [1, 0], [1, 2], [2, 2]],
        2,
        [True, True, True, False],
    )
    np.testing.assert_allclose(result["load"].value(), [1.0, 2 / 3, 1 / 3], rtol=1e-6)
    assert result["dropped"].value() == pytest.approx(1 / 6)
    assert result["entropy"].value() == pytest.approx(np.log(3))
    assert result["logsumexp_squared"].value() == pytest.approx(np.log(3) ** 2)


def test_a_choice_that_was_not_made_is_neither_load_nor_drop():
    # Three choices are made, by token 0 and the first of token 1; the last of them is dropped.
    result = of_tokens(jnp.zeros((2, 3)), [[0, 1], [0, 3]], [[0, 0], [1, 1]], 1, [True, True])
    np.testing.assert_allclose(result["load"].value(), [1.0, 0.5, 0.0])
    assert result["dropped"].value() == pytest.approx(1 / 3)


def test_a_rerouted_choice_is_load_where_it_was_wanted_and_not_dropped():
    assignment = TokenAssignment(
        jnp.array([[0], [2]]), jnp.array([[0], [0]]), jnp.ones((2, 1)), capacity=1
    )
    logits = jnp.zeros((2, 3))
    result = statistics.of_token_choice(
        assignment, jnp.array([[0], [0]]), logits, jax.nn.softmax(logits), jnp.ones(2, bool)
    )
    np.testing.assert_allclose(result["load"].value(), [1.0, 0.0, 0.0])
    assert result["dropped"].value() == 0


S, K, E, C = 7, 2, 4, 2


@given(seed=st.integers(0, 2**32 - 1), scale=st.sampled_from([0.0, 1.0, 30.0]))
@settings(max_examples=25, deadline=None)
def test_token_choice_equals_the_loop(seed, scale):
    generator = np.random.default_rng(seed)
    logits = (scale * generator.normal(size=(S, E))).astype(np.float32)
    wanted = np.argsort(-logits, axis=1)[:, :K]
    wanted[generator.random(S) < 0.3, 1] = E
    slots = generator.integers(0, C + 1, (S, K))
    mask = generator.random(S) < 0.7
    load, made, dropped, entropy, squared, real = [0] * E, 0, 0, 0.0, 0.0, 0
    for s in range(S):
        if not mask[s]:
            continue
        real += 1
        for k in range(K):
            if wanted[s, k] < E:
                load[wanted[s, k]] += 1
                made += 1
                dropped += int(slots[s, k] == C)
        top = max(logits[s].tolist())
        logsumexp = top + math.log(sum(math.exp(v - top) for v in logits[s].tolist()))
        squared += logsumexp**2
        for v in logits[s].tolist():
            entropy -= math.exp(v - logsumexp) * (v - logsumexp)
    got = of_tokens(logits, wanted, slots, C, mask)
    expected = {
        "load": (load, real),
        "dropped": (dropped, made),
        "entropy": (entropy, real),
        "logsumexp_squared": (squared, real),
    }
    assert got.keys() == expected.keys()
    for name, (total, count) in expected.items():
        np.testing.assert_allclose(got[name].total, total, rtol=1e-4, atol=1e-4, err_msg=name)
        assert got[name].count == count, name


# Expert 0 took tokens 1 and 0, expert 1 took token 1, expert 2 took none; token 3 is padding.
TAKEN = ExpertAssignment(
    jnp.array([[1, 0], [1, 4], [4, 4]]), jnp.array([[0.9, 0.5], [0.4, 0.0], [0.0, 0.0]])
)


def test_taken_by_by_hand():
    expected = [[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 0, 0]]
    np.testing.assert_array_equal(statistics.taken_by(TAKEN, 4), expected)


def test_expert_choice_by_hand():
    p = jnp.array([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.0, 0.5, 0.5], [1 / 3, 1 / 3, 1 / 3]])
    result = statistics.of_expert_choice(TAKEN, p, jnp.array([True, True, True, False]))
    np.testing.assert_allclose(result["load"].value(), [2 / 3, 1 / 3, 0], rtol=1e-6)
    assert result["dropped"].value() == pytest.approx(1 / 3)  # Token 2.
    assert result["entropy"].value() == pytest.approx(2 / 3 * np.log(2))


def test_soft_by_hand():
    # Two tokens and padding, two experts with one slot each.
    dispatch = jnp.array([[[0.75], [0.5]], [[0.25], [0.5]], [[0.0], [0.0]]])
    combine = jnp.array([[[0.9], [0.1]], [[0.5], [0.5]], [[0.0], [0.0]]])
    p = jnp.array([[0.9, 0.1], [0.5, 0.5], [0.5, 0.5]])
    result = statistics.of_soft(
        SoftAssignment(dispatch, combine), p, jnp.array([True, True, False])
    )
    np.testing.assert_allclose(result["load"].value(), [0.7, 0.3], rtol=1e-6)
    # -(0.9 ln 0.9 + 0.1 ln 0.1) = 0.3250830 and ln 2.
    assert result["entropy"].value() == pytest.approx((0.3250830 + np.log(2)) / 2, rel=1e-6)
    assert result["largest_dispatch"].value() == pytest.approx((0.75 + 0.5) / 2)
    assert result["largest_combine"].value() == pytest.approx((0.9 + 0.5) / 2)


def test_a_group_of_padding_counts_nothing():
    nobody = jnp.zeros(4, bool)
    p, soft = jnp.full((4, 3), 1 / 3), jnp.full((4, 3, 1), 0.25)
    groups = [
        of_tokens(jnp.zeros((4, 3)), [[0, 1]] * 4, [[2, 2]] * 4, 2, nobody),
        statistics.of_expert_choice(
            ExpertAssignment(jnp.full((3, 2), 4), jnp.zeros((3, 2))), p, nobody
        ),
        statistics.of_soft(SoftAssignment(soft, soft), p, nobody),
    ]
    for result in groups:
        for mean in result.values():
            assert mean.count == 0
            np.testing.assert_array_equal(mean.value(), 0)


def test_entropy_of_a_certain_router_is_zero_and_finite():
    logits = jnp.array([[1000.0, 0.0, 0.0]] * 4)
    result = of_tokens(logits, [[0, 1]] * 4, [[0, 0]] * 4, 4, [True] * 4)
    assert result["entropy"].value() == 0


def test_statistics_carry_no_gradient():
    p, soft = jnp.full((4, 3), 1 / 3), jnp.full((4, 3, 1), 0.25)

    def total(logits, p, soft):
        everybody = jnp.ones(4, bool)
        results = [
            of_tokens(logits, [[0, 1]] * 4, [[0, 0]] * 4, 4, everybody),
            statistics.of_expert_choice(TAKEN, p, everybody),
            statistics.of_soft(SoftAssignment(soft, soft), p, everybody),
        ]
        return sum(mean.value().sum() for result in results for mean in result.values())

    for gradient in jax.grad(total, argnums=(0, 1, 2))(jnp.ones((4, 3)), p, soft):
        assert not gradient.any()


def test_unevenness_of_loads():
    even = statistics.load_evenness(jnp.full(8, 0.25))
    collapsed = statistics.load_evenness(jnp.array([1.0, 1.0, 0, 0, 0, 0, 0, 0]))
    assert (even["max_over_mean_load"], even["load_cv"]) == (1, 0)
    assert collapsed["max_over_mean_load"] == pytest.approx(4)  # E / K
    assert collapsed["load_cv"] == pytest.approx(np.sqrt(3))  # sqrt(E / K - 1)
    assert statistics.load_evenness(jnp.zeros(4))["load_cv"] == 0


def test_unevenness_of_every_layer_at_once():
    loads = jnp.array([[1.0, 1.0], [3.0, 1.0]])
    result = statistics.load_evenness(loads)
    np.testing.assert_allclose(result["max_over_mean_load"], [1, 1.5])
    np.testing.assert_allclose(result["load_cv"], [0, 0.5])
