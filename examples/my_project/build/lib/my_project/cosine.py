"""A router of one's own: cosine similarity with a learned temperature.

Axis letters: S tokens in a group, d width, E experts, K choices per token.
"""

import dataclasses

import jax
import jax.numpy as jnp

import moe_jax as moe


@dataclasses.dataclass
class Cosine(moe.LinearRouter):
    """Top-K of softmax(cos(x, w_e) / temperature), with the temperature learned as in X-MoE.

    Attributes:
      first_temperature: at the start.
    """

    k: int = 2
    losses: moe.Losses = dataclasses.field(default_factory=lambda: moe.Losses(load_balancing=1e-2))
    first_temperature: float = 0.1

    def init(self, key: jax.Array, width: int, num_experts: int) -> dict[str, jax.Array]:
        """weights [d, E] and log_temperature [], float32."""
        log_temperature = jnp.log(jnp.float32(self.first_temperature))
        return {**super().init(key, width, num_experts), "log_temperature": log_temperature}

    def choose(
        self, parameters: dict[str, jax.Array], inputs: moe.RouterInputs, num_experts: int
    ) -> moe.Choice:
        """The K experts that look most like each token."""
        temperature = jnp.exp(parameters["log_temperature"])
        cosines = jnp.einsum(
            "sd,de->se",
            _normalized(inputs.x.astype(jnp.float32), axis=1),
            _normalized(parameters["weights"], axis=0),
            precision="highest",
        )
        logits = cosines / temperature
        probabilities = jax.nn.softmax(logits)
        _, experts = jax.lax.top_k(probabilities, self.k)
        watched = {"temperature": moe.Mean.of_group(temperature, inputs.mask)}
        return moe.Choice(logits, experts, weights=probabilities, statistics=watched)


def _normalized(x: jax.Array, axis: int) -> jax.Array:
    return x * jax.lax.rsqrt((x**2).sum(axis=axis, keepdims=True) + 1e-6)
