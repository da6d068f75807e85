"""The MoE layer in a plain NNX model: no config file, no trainer, no mesh.

python -m examples.nnx_model
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from examples import regions
from moe_jax.layers.mode import Mode
from moe_jax.layers.moe import MoE, MoEConfig
from moe_jax.routing.losses import Losses
from moe_jax.routing.token_choice import TopK


class Model(nnx.Module):
    """A linear map, a MoE of 4 experts, a linear map."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        width = regions.WIDTH
        router = TopK(k=2, renormalize=True, losses=Losses(load_balancing=1e-2, router_z=1e-3))
        config = MoEConfig(router=router, group_size=64)
        self.inward = nnx.Linear(width, width, rngs=rngs)
        self.moe = MoE(config, width, 32, num_experts=4, scale=1.0, key=rngs.params())
        self.outward = nnx.Linear(width, width, rngs=rngs)

    def __call__(
        self, x: jax.Array, mode: Mode, key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """[B, L, d] to [B, L, d], and the router's losses times their coefficients []."""
        # A group must divide the tokens, here 8 * 32.
        hidden, report = self.moe(self.inward(x), mode=mode, key=key)
        return self.outward(x + hidden), report.auxiliary_loss


def main(steps: int = 200) -> list[float]:
    """Trains and returns the squared error of each step."""
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model: Model, optimizer: nnx.Optimizer, key: jax.Array) -> jax.Array:
        data_key, noise_key = jax.random.split(key)
        x, y = regions.batch(data_key)

        def loss(model: Model) -> tuple[jax.Array, jax.Array]:
            predicted, auxiliary = model(x, Mode.TRAIN, noise_key)
            error = jnp.mean((predicted - y) ** 2)
            return error + auxiliary, error

        gradients, error = nnx.grad(loss, has_aux=True)(model)
        optimizer.update(model, gradients)
        return error

    return [float(step(model, optimizer, jax.random.key(i))) for i in range(steps)]


if __name__ == "__main__":
    errors = main()
    print(f"squared error {errors[0]:.2f} at the first step, {errors[-1]:.2f} at the last")
