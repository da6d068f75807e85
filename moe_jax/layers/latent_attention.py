"""Multi-head latent attention (DeepSeek-V2, section 2.1 and appendix B).

Axis letters: B batch, L query length, M cache or key length, H heads, d width, q and c ranks of
queries and of keys and values, n and r widths of a head's part without and with rotation, v width
of a head's values.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from moe_jax.component import field
from moe_jax.errors import UserError
from moe_jax.layers.attention import AttentionConfig, AttentionInputs, readable
from moe_jax.layers.attention_kernels import attend
from moe_jax.layers.initializers import Scale, scaled_truncated_normal
from moe_jax.layers.normalization import RMSNorm
from moe_jax.layers.positions import RotaryScaling, rotate
from moe_jax.layers.projection import project
from moe_jax.parallel.sharding import constrain


@dataclasses.dataclass
class MultiHeadLatent(AttentionConfig):
    """Keys and values of all heads are linear in one vector of width c, which alone is cached.

    `model.head_width` is not read: a head has the widths below.

    Attributes:
      query_rank: q; 0 for queries that are linear in the token (V2-Lite).
      kv_rank: c.
      nope_width: n, of the part of queries and keys without positions.
      rotary_width: r, of the rotated part, whose keys all heads share.
      value_width: v.
      rotary_base: of the rotation.
      rotary_scaling: for longer texts than the training's.
      norm_epsilon: of the norms of the two compressed vectors.
    """

    query_rank: int = field(0, at_least=0)
    kv_rank: int = field(512, at_least=1)
    nope_width: int = field(128, at_least=1)
    rotary_width: int = field(64, at_least=1)
    value_width: int = field(128, at_least=1)
    rotary_base: float = 10_000.0
    rotary_scaling: RotaryScaling = dataclasses.field(default_factory=RotaryScaling)
    norm_epsilon: float = 1e-6

    def validate(self, num_heads: int, head_width: int, path: str = "model") -> None:
        """Raises UserError for widths that cannot be."""
        self.check_ranges(f"{path}.attention")
        self.rotary_scaling.validate()
        if self.rotary_width % 2:
            raise UserError(
                f"{path}.attention.rotary_width is {self.rotary_width}; rotary positions need an "
                "even width."
            )

    def build(
        self,
        width: int,
        num_heads: int,
        head_width: int,
        scale: Scale,
        key: Key[Array, ""],
        causal: bool,
    ) -> "LatentAttention":
        """See `AttentionConfig`."""
        return LatentAttention(self, width, num_heads, scale, key, causal)

    def empty_cache(
        self, batch: int, length: int, num_heads: int, head_width: int, dtype: Any
    ) -> "LatentCache":
        """See `AttentionConfig`."""
        return LatentCache(
            jnp.zeros((batch, length, self.kv_rank), dtype),
            jnp.zeros((batch, length, self.rotary_width), dtype),
        )

    def score_widths(self, head_width: int) -> tuple[int, int]:
        """See `AttentionConfig`."""
        return self.nope_width + self.rotary_width, self.value_width


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LatentCache:
    """What one layer remembers of each token, for all heads.

    Attributes:
      latent: [B, M, c] normalized, in the compute dtype.
      rotated: [B, M, r] the keys' rotated part.
    """

    latent: jax.Array
    rotated: jax.Array


class LatentAttention(nnx.Module):
    """What `MultiHeadLatent` builds.

    Attributes:
      query_down: [d, q] float32, and query_norm, where queries are compressed.
      query: [q or d, H, n + r].
      kv_down: [d, c + r]: the latent vector, and the keys' rotated part.
      latent_norm: of the latent vector.
      key_value: [c, H, n + v].
      out: [H, v, d].
    """

    def __init__(
        self,
        config: MultiHeadLatent,
        width: int,
        num_heads: int,
        scale: Scale,
        key: Key[Array, ""],
        causal: bool,
    ) -> None:
        down_key, query_key, kv_down_key, kv_key, out_key = jax.random.split(key, 5)
        self.config = nnx.static(config)
        self.causal = causal
        rank, rotary = config.kv_rank, config.rotary_width
        of_query = width
        if config.query_rank:
            of_query = config.query_rank
            down = scaled_truncated_normal(down_key, (width, of_query), width, scale)
            self.query_down = nnx.Param(down, axes=("embed", "latent"))
            self.query_norm = RMSNorm(of_query, config.norm_epsilon)
        shape = (of_query, num_heads, config.nope_width + rotary)
        first = "latent" if config.query_rank else "embed"
        self.query = nnx.Param(
            scaled_truncated_normal(query_key, shape, of_query, scale),
            axes=(first, "heads", "head"),
        )
        kv_down = scaled_truncated_normal(kv_down_key, (width, rank + rotary), width, scale)
        self.kv_down = nnx.Param(kv_down, axes=("embed", "latent"))
        self.latent_norm = RMSNorm(rank, config.norm_epsilon)
        shape = (rank, num_heads, config.nope_width + config.value_width)
        self.key_value = nnx.Param(
            scaled_truncated_normal(kv_key, shape, rank, scale), axes=("latent", "heads", "head")
        )
        shape = (num_heads, config.value_width, width)
        out = scaled_truncated_normal(out_key, shape, num_heads * config.value_width, scale)
        self.out = nnx.Param(out, axes=("heads", "head", "embed"))

    @jax.named_scope("attention")
    def __call__(
        self, x: Float[Array, "B L d"], inputs: AttentionInputs, cache: LatentCache | None = None
    ) -> tuple[Float[Array, "B L d"], LatentCache | None]:
        """[B, L, d] to [B, L, d], and the cache with this call's tokens."""
        config: MultiHeadLatent = self.config
        compressed = x
        if config.query_rank:
            compressed = self.query_norm(project(x, self.query_down[...]))
        query = project(compressed, self.query[...])
        query = constrain(query, "batch", "length", "heads", "head")
        query, query_rotated = jnp.split(query, [config.nope_width], axis=-1)
        rotary = (inputs.positions, config.rotary_base, config.rotary_scaling)
        query_rotated = rotate(query_rotated, *rotary)

        down = project(x, self.kv_down[...])
        latent, rotated = jnp.split(down, [config.kv_rank], axis=-1)
        latent = self.latent_norm(latent)
        rotated = rotate(rotated[:, :, None], *rotary)[:, :, 0]
        mask = readable(x.shape[1], inputs)
        if cache is not None and inputs.view is not None:
            start = inputs.view.start
            latent = jax.lax.dynamic_update_slice_in_dim(cache.latent, latent, start, axis=1)
            rotated = jax.lax.dynamic_update_slice_in_dim(cache.rotated, rotated, start, axis=1)
            cache = LatentCache(latent, rotated)
            attended = self._absorbed(query, query_rotated, cache, mask)
        else:
            attended = self._expanded(query, query_rotated, latent, rotated, mask)
        return project(attended, self.out[...], contracted=2), cache

    @property
    def _scale(self) -> float:
        width = self.config.nope_width + self.config.rotary_width
        return self.config.rotary_scaling.of_scores / math.sqrt(width)

    def _up(self, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """[c, H, n] of keys and [c, H, v] of values."""
        key, value = jnp.split(self.key_value[...].astype(dtype), [self.config.nope_width], axis=-1)
        return key, value

    def _expanded(
        self,
        query: jax.Array,
        query_rotated: jax.Array,
        latent: jax.Array,
        rotated: jax.Array,
        mask: jax.Array | None,
    ) -> jax.Array:
        """[B, L, H, v] by keys and values of every head, the cheaper way for a whole sequence."""
        of_key, of_value = self._up(query.dtype)
        key, value = project(latent, of_key), project(latent, of_value)
        shared = jnp.broadcast_to(rotated[:, :, None], (*key.shape[:3], rotated.shape[-1]))
        return attend(
            jnp.concatenate([query, query_rotated], axis=-1),
            jnp.concatenate([key, shared], axis=-1),
            value,
            mask=mask,
            causal=self.causal,
            scale=self._scale,
        )

    def _absorbed(
        self,
        query: jax.Array,
        query_rotated: jax.Array,
        cache: LatentCache,
        mask: jax.Array | None,
    ) -> jax.Array:
        """[B, L, H, v] without expanding the cache: of each head's query, c numbers (App. B.1)."""
        of_key, of_value = self._up(query.dtype)
        absorbed = jnp.einsum("blHn,cHn->blHc", query, of_key)
        scores = jnp.einsum(
            "blHc,bmc->bHlm", absorbed, cache.latent, preferred_element_type=jnp.float32
        ) + jnp.einsum(
            "blHr,bmr->bHlm", query_rotated, cache.rotated, preferred_element_type=jnp.float32
        )
        weights = self._weights(scores, mask, query.dtype)
        latent = jnp.einsum("bHlm,bmc->blHc", weights, cache.latent)
        return jnp.einsum("blHc,cHv->blHv", latent, of_value)

    def _weights(self, scores: jax.Array, mask: jax.Array | None, dtype: Any) -> jax.Array:
        scores = scores * self._scale
        if mask is not None:
            scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
        return jax.nn.softmax(scores, axis=-1).astype(dtype)
