"""Normalization of vectors.

Axis letters: d width.
"""

import enum

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class Norm(enum.StrEnum):
    """RMS: x / rms(x) * scale (Zhang & Sennrich 2019; T5's layer norm).

    LAYER: (x - mean(x)) / deviation(x) * scale + bias (Ba et al. 2016).
    """

    RMS = "rms"
    LAYER = "layer"


class RMSNorm(nnx.Module):
    """`Norm.RMS`, computed in float32.

    Attributes:
      scale: [d] float32, 1 at the start.
    """

    def __init__(self, width: int, epsilon: float = 1e-6) -> None:
        self.scale = nnx.Param(jnp.ones(width), axes=("norm",))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*rows d"]) -> Float[Array, "*rows d"]:
        """[..., d] to [..., d], dtype kept."""
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
        return (wide * jax.lax.rsqrt(mean_square + self.epsilon) * self.scale[...]).astype(x.dtype)


class LayerNorm(nnx.Module):
    """`Norm.LAYER`, computed in float32.

    Attributes:
      scale: [d] float32, 1 at the start.
      bias: [d] float32, 0 at the start.
    """

    def __init__(self, width: int, epsilon: float = 1e-6) -> None:
        self.scale = nnx.Param(jnp.ones(width), axes=("norm",))
        self.bias = nnx.Param(jnp.zeros(width), axes=("norm",))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*rows d"]) -> Float[Array, "*rows d"]:
        """[..., d] to [..., d], dtype kept."""
        wide = x.astype(jnp.float32)
        normalized = jax.nn.standardize(wide, axis=-1, epsilon=self.epsilon)
        return (normalized * self.scale[...] + self.bias[...]).astype(x.dtype)


def make_norm(kind: Norm, width: int, epsilon: float) -> RMSNorm | LayerNorm:
    """A norm of vectors [..., d]."""
    return RMSNorm(width, epsilon) if kind == Norm.RMS else LayerNorm(width, epsilon)
