import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from moe_jax.errors import UserError
from moe_jax.routing import scores
from moe_jax.routing.scores import Exploration, RouterDtype
from tests.routing.inputs import group, vectors


def explored(x, exploration, rate, **more):
    return scores.explored_input(group(x, **more), exploration, rate)


def test_initial_weights_are_normal_with_deviation_0_02():
    weights = scores.initial_weights(jax.random.key(0), 64, 32)
    assert (weights.shape, weights.dtype) == ((64, 32), jnp.float32)
    # 2,048 numbers: four standard errors of the deviation are 0.0013, of the mean 0.0018.
    assert weights.std() == pytest.approx(0.02, abs=0.0013)
    assert weights.mean() == pytest.approx(0, abs=0.0018)


@pytest.mark.parametrize("exploration", Exploration)
def test_evaluation_explores_nothing(exploration):
    x = vectors(6)
    np.testing.assert_array_equal(explored(x, exploration, 0.5, train=False), x)


@pytest.mark.parametrize("exploration", ["argmax", "sample"])
def test_argmax_and_sample_leave_the_input_alone(exploration):
    x = vectors(6)
    np.testing.assert_array_equal(explored(x, Exploration(exploration), 0.5), x)


def test_jitter_multiplies_by_a_uniform_number_around_one():
    x = vectors(256, width=16)
    factor = np.asarray(explored(x, Exploration.JITTER, 0.1) / x)
    assert factor.min() == pytest.approx(0.9, abs=1e-3)
    assert factor.max() == pytest.approx(1.1, abs=1e-3)
    # 4,096 draws of deviation 0.2 / sqrt(12): four standard errors.
    assert factor.mean() == pytest.approx(1, abs=0.0037)
    assert factor.std() == pytest.approx(0.2 / 12**0.5, rel=0.03)
    assert len(np.unique(factor)) > 4000, "one factor was shared"


def test_input_dropout_keeps_the_expectation():
    dropped = np.asarray(explored(jnp.ones((256, 16)), Exploration.INPUT_DROPOUT, 0.25))
    np.testing.assert_allclose(np.unique(dropped), [0, 4 / 3], rtol=1e-6)
    # 4,096 draws of deviation 0.577: four standard errors.
    assert dropped.mean() == pytest.approx(1, abs=0.036)


@pytest.mark.parametrize("exploration", ["jitter", "input_dropout"])
def test_noise_is_reproducible_from_the_key(exploration):
    x = vectors(6)
    first, again, other = (
        explored(x, Exploration(exploration), 0.5, seed=seed) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_the_explored_input_is_float32():
    for exploration in Exploration:
        assert explored(jnp.ones((2, 3), jnp.bfloat16), exploration, 0.1).dtype == jnp.float32


def test_product_of_narrow_input_is_float32():
    # 1/3 in bfloat16 is 0.333984375; a bfloat16 product would round 1.00390625 * it.
    got = scores.product(jnp.full((1, 1), 1 / 3, jnp.bfloat16), jnp.full((1, 2), 1.00390625))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, 0.333984375 * 1.00390625, rtol=1e-7)


def test_product_with_a_matrix_of_many_axes_by_hand():
    x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    weights = jnp.arange(12.0).reshape(2, 3, 2)
    expected = [
        [
            [x[s, 0] * weights[0, i, j] + x[s, 1] * weights[1, i, j] for j in range(2)]
            for i in range(3)
        ]
        for s in range(2)
    ]
    np.testing.assert_allclose(scores.product(x, weights), expected, rtol=1e-6)


def test_soft_cap_by_hand():
    # 2 tanh(1/2) = 0.9242343, 2 tanh(5) = 1.9998184.
    got = scores.soft_cap(jnp.array([0.0, 1.0, -1.0, 10.0]), 2.0)
    np.testing.assert_allclose(got, [0, 0.9242343, -0.9242343, 1.9998184], rtol=1e-6)
    assert jnp.abs(scores.soft_cap(jnp.array([1e6, -1e6]), 2.0)).max() <= 2


def test_no_soft_cap_changes_nothing():
    logits = vectors(3)
    np.testing.assert_array_equal(scores.soft_cap(logits, 0.0), logits)


def test_soft_cap_gradient_equals_finite_differences():
    def capped(z):
        return scores.soft_cap(jnp.asarray(z), 2.0)

    check_grads(capped, (vectors(3),), order=1, modes=["rev"], eps=1e-2)


@pytest.mark.parametrize(
    ("exploration", "rate", "message"),
    [
        ("argmax", 1.0, r"router.exploration_rate is 1.0; it must be in \[0, 1\)\."),
        ("jitter", -0.1, r"router.exploration_rate is -0.1; it must be in \[0, 1\)\."),
        ("jitter", 0.0, "so router.exploration=jitter does nothing; set a rate such as 0.01"),
        ("input_dropout", 0.0, "so router.exploration=input_dropout does nothing"),
        ("jitter", float("nan"), "router.exploration_rate is nan"),
    ],
)
def test_bad_exploration_is_named(exploration, rate, message):
    with pytest.raises(UserError, match=message):
        scores.validate_exploration(Exploration(exploration), rate)


@pytest.mark.parametrize(
    ("exploration", "rate"), [("argmax", 0.0), ("sample", 0.0), ("jitter", 0.01)]
)
def test_good_exploration_passes(exploration, rate):
    scores.validate_exploration(Exploration(exploration), rate)


def test_rounding_to_bfloat16_is_the_conversion_also_when_compiled():
    x = vectors(6)
    expected = x.astype(jnp.bfloat16).astype(jnp.float32)
    assert (expected != x).any()
    got = jax.jit(lambda x: scores.rounded(x, RouterDtype.BFLOAT16))(x)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, expected)


def test_float32_rounds_nothing():
    x = vectors(6)
    assert scores.rounded(x, RouterDtype.FLOAT32) is x


def test_rounding_rounds_the_gradient():
    gradient = jax.grad(lambda x: 1.001 * scores.rounded(x, RouterDtype.BFLOAT16))(0.5)
    assert gradient == 1.0, "1.001 is not a number of bfloat16"
