import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.routing.assignment import TokenChoice
from moe_jax.routing.statistics import of_load, of_token_choice


def statistics(logits, experts, slots, capacity, mask):
    assignment = TokenChoice(jnp.array(experts), jnp.array(slots), jnp.ones((4, 2)), capacity)
    return of_token_choice(assignment, logits, jax.nn.softmax(logits), jnp.array(mask))


def test_by_hand():
    # Token 2 lost its second choice, token 3 is padding.
    result = statistics(
        jnp.zeros((4, 3)),
        experts=[[0, 1], [0, 2], [1, 0], [2, 1]],
        slots=[[0, 0], [1, 0], [1, 2], [2, 2]],
        capacity=2,
        mask=[True, True, True, False],
    )
    np.testing.assert_allclose(result["load"].value(), [1.0, 2 / 3, 1 / 3], rtol=1e-6)
    assert result["dropped"].value() == pytest.approx(1 / 6)
    assert result["entropy"].value() == pytest.approx(np.log(3))
    assert result["logsumexp_squared"].value() == pytest.approx(np.log(3) ** 2)


def test_entropy_of_a_certain_router_is_zero_and_finite():
    logits = jnp.array([[1000.0, 0.0, 0.0]] * 4)
    result = statistics(logits, [[0, 1]] * 4, [[0, 0]] * 4, 4, [True] * 4)
    assert result["entropy"].value() == 0


def test_statistics_carry_no_gradient():
    def total(logits):
        result = statistics(logits, [[0, 1]] * 4, [[0, 0]] * 4, 4, [True] * 4)
        return sum(mean.value().sum() for mean in result.values())

    assert not jax.grad(total)(jnp.ones((4, 3))).any()


def test_unevenness_of_loads():
    even, collapsed = of_load(jnp.full(8, 0.25)), of_load(jnp.array([1.0, 1.0, 0, 0, 0, 0, 0, 0]))
    assert (even["max_over_mean_load"], even["load_cv"]) == (1, 0)
    assert collapsed["max_over_mean_load"] == pytest.approx(4)  # E / K
    assert collapsed["load_cv"] == pytest.approx(np.sqrt(3))  # sqrt(E / K - 1)
    assert of_load(jnp.zeros(4))["load_cv"] == 0
