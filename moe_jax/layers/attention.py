"""Causal multi-head self-attention with rotary positions and an optional key-value cache.

Axis letters: B batch, L query length, M cache length, H heads, h head width, d width.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.layers.initializers import scaled_truncated_normal
from moe_jax.parallel.sharding import constrain

ROTARY_BASE = 10_000.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyValues:
    """Keys and values of the tokens seen so far, in one layer.

    Attributes:
      keys: [B, M, H, h] in the compute dtype.
      values: [B, M, H, h].
    """

    keys: jax.Array
    values: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CacheView:
    """Where in the cache this call writes and what it may read.

    Attributes:
      start: [] int32, the first cache position the call's tokens are written to.
      filled: [B, M] bool, positions that hold a real token once this call has written.
    """

    start: jax.Array
    filled: jax.Array


class Attention(nnx.Module):
    """softmax(q k / sqrt(h)) v (Vaswani 2017), no biases.

    A token sees itself and earlier ones, or all of its sequence where `causal` is False. Queries
    and keys are rotated by their positions (`rotate`), so a cache holds rotated keys.

    Attributes:
      qkv: [d, 3, H, h] float32.
      out: [H, h, d] float32.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        head_width: int,
        scale: float,
        key: jax.Array,
        causal: bool = True,
    ) -> None:
        qkv_key, out_key = jax.random.split(key)
        qkv = scaled_truncated_normal(qkv_key, (width, 3, num_heads, head_width), width, scale)
        out = scaled_truncated_normal(
            out_key, (num_heads, head_width, width), num_heads * head_width, scale
        )
        self.qkv = nnx.Param(qkv, axes=("embed", "qkv", "heads", "head"))
        self.out = nnx.Param(out, axes=("heads", "head", "embed"))
        self.causal = causal

    @jax.named_scope("attention")
    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        mask: jax.Array | None,
        cache: KeyValues | None = None,
        view: CacheView | None = None,
    ) -> tuple[jax.Array, KeyValues | None]:
        """Attends.

        Args:
          x: [B, L, d].
          positions: [B, L] int32.
          mask: [B, L] bool, False for padding; None where there is none. Read without a cache only.
          cache: keys and values of earlier calls, and
          view: where this call stands in them.

        Returns:
          [B, L, d], and the cache with this call's keys and values.
        """
        dtype = x.dtype
        projected = jnp.einsum("bld,dnHh->nblHh", x, self.qkv[...].astype(dtype))
        query, key, value = (constrain(p, "batch", "length", "heads", "head") for p in projected)
        query, key = rotate(query, positions), rotate(key, positions)
        if cache is not None and view is not None:
            keys = jax.lax.dynamic_update_slice_in_dim(cache.keys, key, view.start, axis=1)
            values = jax.lax.dynamic_update_slice_in_dim(cache.values, value, view.start, axis=1)
            cache = KeyValues(keys, values)
            attended = jax.nn.dot_product_attention(
                query, keys, values, mask=_cached_causal_mask(x.shape[1], view)
            )
        else:
            readable = None if mask is None else mask[:, None, None, :]
            attended = jax.nn.dot_product_attention(
                query, key, value, mask=readable, is_causal=self.causal
            )
        return jnp.einsum("blHh,Hhd->bld", attended, self.out[...].astype(dtype)), cache


def rotate(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Rotary position embedding (Su et al. 2021, eq. 34), pairing entry i with i + h/2.

    The product of a rotated query and a rotated key depends on the difference of their positions.

    Args:
      x: [B, L, H, h], h even.
      positions: [B, L] int32.

    Returns:
      [B, L, H, h] in the dtype of `x`; the rotation is computed in float32.
    """
    half = x.shape[-1] // 2
    frequency = ROTARY_BASE ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[:, :, None, None] * frequency
    sine, cosine = jnp.sin(angle), jnp.cos(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = [first * cosine - second * sine, second * cosine + first * sine]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def _cached_causal_mask(length: int, view: CacheView) -> jax.Array:
    """[B, 1, L, M] bool: cache position is filled and not after the query's own."""
    query = view.start + jnp.arange(length)
    earlier = jnp.arange(view.filled.shape[1])[None, :] <= query[:, None]
    return (view.filled[:, None, :] & earlier[None])[:, None]
