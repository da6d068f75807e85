import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.routing.losses import load_balancing, router_z

GATES = jnp.array([[0.5, 0.4, 0.1], [0.3, 0.3, 0.4], [0.1, 0.2, 0.7], [0.8, 0.2, 0.0]])


def value(probabilities, mask=None):
    experts = jnp.argmax(probabilities, axis=-1, keepdims=True).astype(jnp.int32)
    mask = jnp.ones(len(probabilities), bool) if mask is None else mask
    return load_balancing(probabilities, experts, mask).value()


def test_load_balancing_published_value():
    # f = [1/2, 0, 1/2], P = [0.425, 0.275, 0.3], 3 * (0.2125 + 0.15).
    assert value(GATES) == pytest.approx(1.0875, abs=1e-6)


def test_load_balancing_is_one_at_balance_and_e_at_collapse():
    identity = jnp.eye(5)
    assert value(identity) == pytest.approx(1.0)
    assert value(jnp.tile(identity[:1], (5, 1))) == pytest.approx(5.0)


def test_load_balancing_counts_first_choices_only():
    mask = jnp.ones(4, bool)
    first = jnp.argsort(-GATES, axis=-1)[:, :1]
    both = jnp.argsort(-GATES, axis=-1)[:, :2]
    one, two = (load_balancing(GATES, experts, mask).value() for experts in (first, both))
    assert one == two


def test_load_balancing_gradient_is_that_of_the_probabilities_alone():
    gradient = jax.grad(value)(GATES)
    # E * f_e / S for every token: f carries no gradient.
    np.testing.assert_allclose(gradient, np.tile([3 * 0.5 / 4, 0, 3 * 0.5 / 4], (4, 1)), rtol=1e-6)


def test_gradients_at_exact_balance_are_finite_and_zero():
    # Equal logits: whatever the first choices, moving one logit moves P of all alike.
    experts = jnp.arange(4)[:, None] % 4

    def loss(logits):
        return load_balancing(jax.nn.softmax(logits), experts, jnp.ones(4, bool)).value()

    np.testing.assert_allclose(jax.grad(loss)(jnp.zeros((4, 4))), 0, atol=1e-7)


def test_padding_does_not_enter():
    padded = jnp.concatenate([GATES, jnp.array([[0.0, 1.0, 0.0]] * 3)])
    mask = jnp.arange(7) < 4
    assert value(padded, mask) == pytest.approx(1.0875, abs=1e-6)
    logits = jnp.log(padded + 0.1)
    assert router_z(logits, mask).value() == pytest.approx(
        float(router_z(logits[:4], jnp.ones(4, bool)).value())
    )


def test_a_group_of_padding_weighs_nothing():
    nothing = load_balancing(GATES, jnp.zeros((4, 1), jnp.int32), jnp.zeros(4, bool))
    assert (nothing.total, nothing.count) == (0, 0)
    assert nothing.value() == 0
    assert router_z(GATES, jnp.zeros(4, bool)).value() == 0


def test_router_z_by_hand():
    everything = jnp.ones(3, bool)
    assert router_z(jnp.zeros((3, 8)), everything).value() == pytest.approx(np.log(8) ** 2)
    # logsumexp(ln 1, ln 2, ln 5) = ln 8; logsumexp of zeros = ln 3; a mean, not a sum.
    logits = jnp.log(jnp.array([[1.0, 2.0, 5.0], [1.0, 1.0, 1.0]]))
    expected = (np.log(8) ** 2 + np.log(3) ** 2) / 2
    assert router_z(logits, jnp.ones(2, bool)).value() == pytest.approx(expected, rel=1e-6)
