"""RMS normalization."""

import jax
import jax.numpy as jnp
from flax import nnx


class RMSNorm(nnx.Module):
    """x / rms(x) * scale (Zhang & Sennrich 2019), computed in float32; T5's layer norm.

    Attributes:
      scale: [d] float32, 1 at the start.
    """

    def __init__(self, width: int, epsilon: float = 1e-6) -> None:
        self.scale = nnx.Param(jnp.ones(width), axes=("norm",))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., d] to [..., d], dtype kept."""
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
        return (wide * jax.lax.rsqrt(mean_square + self.epsilon) * self.scale[...]).astype(x.dtype)
