"""The router alone, in the layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from my_project.cosine import Cosine

import moe_jax as moe

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (4, 32, 16))


def layer() -> moe.MoE:
    return moe.MoE(moe.MoEConfig(router=Cosine()), width=16, mlp_width=32, num_experts=8, key=KEY)


def test_lengths_of_tokens_do_not_matter() -> None:
    one, ten = (layer()(scale * X)[1].statistics["load"] for scale in (1, 10))
    np.testing.assert_allclose(one, ten, atol=1e-6)


def test_the_temperature_is_logged_and_learned() -> None:
    def loss(layer: moe.MoE) -> jax.Array:
        y, report = layer(X, mode=moe.Mode.TRAIN, key=KEY)
        return (y**2).mean() + report.auxiliary_loss

    gradients = nnx.grad(loss)(layer())
    assert abs(float(gradients["router"]["log_temperature"][...])) > 0
    assert float(layer()(X)[1].statistics["temperature"]) == pytest.approx(0.1)


def test_a_token_does_not_see_later_ones() -> None:
    changed = X.at[:, 20:].set(jnp.flip(X[:, 20:], axis=1))
    np.testing.assert_array_equal(layer()(X)[0][:, :20], layer()(changed)[0][:, :20])
