"""The MoE layer in a Flax Linen model, through `nnx.bridge`.

    python -m examples.linen_model

The router is DeepSeek-V3's: its expert bias is no parameter, so it has a collection of its own.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen, nnx

from examples import regions
from moe_jax.layers.mode import Mode
from moe_jax.layers.moe import MoE, MoEConfig
from moe_jax.routing.deepseek import DeepSeekV3


class Experts(nnx.Module):
    """What is bridged: ToLinen passes `rngs`."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        router = DeepSeekV3(k=2, groups=2, groups_per_token=1, bias_rate=1e-2)
        config = MoEConfig(router=router, group_size=64, shared_experts=1)
        self.moe = MoE(config, regions.WIDTH, 32, num_experts=8, scale=1.0, key=rngs.params())

    def __call__(self, x: jax.Array, mode: Mode) -> tuple[jax.Array, jax.Array]:
        """[B, L, d] to [B, L, d], and the router's losses times their coefficients []."""
        y, report = self.moe(x, mode=mode)
        return y, report.auxiliary_loss


class Model(linen.Module):
    """A dense layer, the experts, a dense layer."""

    @linen.compact
    def __call__(self, x: jax.Array, mode: Mode) -> tuple[jax.Array, jax.Array]:
        """[B, L, d] to [B, L, d], and the router's loss []."""
        hidden = linen.Dense(regions.WIDTH)(x)
        routed, auxiliary = nnx.bridge.to_linen(Experts, name="experts")(hidden, mode)
        return linen.Dense(regions.WIDTH)(x + routed), auxiliary


def main(steps: int = 200) -> tuple[list[float], jax.Array]:
    """Trains; returns the squared error of each step and the expert bias [E] at the end."""
    model, optimizer = Model(), optax.adam(1e-2)
    x, _ = regions.batch(jax.random.key(0))
    variables = jax.jit(model.init, static_argnums=2)(jax.random.key(0), x, Mode.EVALUATE)
    parameters, state = variables["params"], {"RouterState": variables["RouterState"]}
    moments = optimizer.init(parameters)

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(parameters: Any, state: Any, moments: Any, key: jax.Array) -> tuple:
        x, y = regions.batch(key)

        def loss(parameters: Any) -> tuple[jax.Array, tuple[jax.Array, Any]]:
            (predicted, auxiliary), new_state = model.apply(
                {"params": parameters, **state}, x, Mode.TRAIN, mutable=["RouterState"]
            )
            error = jnp.mean((predicted - y) ** 2)
            return error + auxiliary, (error, new_state)

        gradients, (error, new_state) = jax.grad(loss, has_aux=True)(parameters)
        updates, moments = optimizer.update(gradients, moments, parameters)
        return optax.apply_updates(parameters, updates), new_state, moments, error

    errors = []
    for i in range(steps):
        parameters, state, moments, error = step(parameters, state, moments, jax.random.key(i))
        errors.append(float(error))
    return errors, jax.tree.leaves(state)[0]


if __name__ == "__main__":
    errors, bias = main()
    print(f"squared error {errors[0]:.2f} at the first step, {errors[-1]:.2f} at the last")
    print(f"expert bias {bias.round(2)}")
