"""Token embedding; its table is also the output projection."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.layers.initializers import scaled_truncated_normal


class TokenEmbedding(nnx.Module):
    """Embedding table tied to the output layer.

    Axis letters: B batch, L length, V vocabulary, d width.

    Attributes:
      table: [V, d] float32 with variance scale / d, so that logits have unit variance at the start.
    """

    def __init__(self, vocab_size: int, width: int, scale: float, key: jax.Array) -> None:
        table = scaled_truncated_normal(key, (vocab_size, width), width, scale)
        self.table = nnx.Param(table, axes=("vocabulary", "embed"))

    @jax.named_scope("embedding")
    def __call__(self, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Ids [B, L] int32 to vectors [B, L, d] of unit variance: rows times sqrt(d)."""
        table = self.table[...].astype(dtype)
        return table[tokens] * jnp.sqrt(table.shape[1]).astype(dtype)

    @jax.named_scope("logits")
    def logits(self, x: jax.Array) -> jax.Array:
        """[B, L, d] to [B, L, V] float32."""
        return jnp.einsum(
            "bld,vd->blv",
            x,
            self.table[...].astype(x.dtype),
            preferred_element_type=jnp.float32,
        )
