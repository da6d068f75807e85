"""Attention of a decoder to the encoder's output.

Axis letters: B batch, L query length, M memory length, H heads, h head width, d width.
"""

import math

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from moe_jax.layers.attention import KeyValues, unstacked
from moe_jax.layers.attention_kernels import attend
from moe_jax.layers.initializers import Scale, scaled_truncated_normal
from moe_jax.layers.projection import project
from moe_jax.parallel.sharding import constrain


class CrossAttention(nnx.Module):
    """softmax(q k) v with keys and values of another sequence, without positions (T5).

    Attributes:
      query: [d, H, h] float32.
      key_value: [d, 2, H, h].
      out: [H, h, d].
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        head_width: int,
        scaled: bool,
        scale: Scale,
        key: Key[Array, ""],
    ) -> None:
        """Draws the parameters; `scaled` divides scores by sqrt(h)."""
        query_key, kv_key, out_key = jax.random.split(key, 3)
        query = scaled_truncated_normal(query_key, (width, num_heads, head_width), width, scale)
        shape = (width, 2, num_heads, head_width)
        out_shape = (num_heads, head_width, width)
        out = scaled_truncated_normal(out_key, out_shape, num_heads * head_width, scale)
        self.query = nnx.Param(query, axes=("embed", "heads", "head"))
        self.key_value = nnx.Param(
            scaled_truncated_normal(kv_key, shape, width, scale),
            axes=("embed", "qkv", "heads", "head"),
        )
        self.out = nnx.Param(out, axes=("heads", "head", "embed"))
        self.scaled = scaled

    @jax.named_scope("cross_attention")
    def keys_and_values(self, memory: Float[Array, "B M d"]) -> KeyValues:
        """Of the memory [B, M, d]; decoding computes them once."""
        keys, values = (
            constrain(part, "batch", "length", "heads", "head")
            for part in unstacked(project(memory, self.key_value[...]))
        )
        return KeyValues(keys, values)

    @jax.named_scope("cross_attention")
    def __call__(
        self, x: Float[Array, "B L d"], memory: KeyValues, mask: Bool[Array, "B M"] | None
    ) -> Float[Array, "B L d"]:
        """[B, L, d] to [B, L, d]; mask [B, M] bool, False for the memory's padding."""
        query = project(x, self.query[...])
        attended = attend(
            constrain(query, "batch", "length", "heads", "head"),
            memory.keys,
            memory.values,
            mask=None if mask is None else mask[:, None, None, :],
            scale=1 / math.sqrt(query.shape[-1]) if self.scaled else 1.0,
        )
        return project(attended, self.out[...], contracted=2)
