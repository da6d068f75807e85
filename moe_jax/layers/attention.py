"""Self-attention with several heads: what a config chooses, caches, and the layer.

Axis letters: B batch, L query length, M cache or key length, H heads, J heads of keys and values,
h head width, d width.
"""

import abc
import dataclasses
import enum
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from moe_jax.component import Component
from moe_jax.errors import UserError
from moe_jax.layers.attention_kernels import attend
from moe_jax.layers.initializers import Scale, scaled_truncated_normal
from moe_jax.layers.normalization import RMSNorm
from moe_jax.layers.positions import RelativeBias, RelativeScores, RotaryScaling, rotate
from moe_jax.layers.projection import project
from moe_jax.parallel.sharding import constrain


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionInputs:
    """What attention knows beside the vectors.

    Attributes:
      positions: [B, L] int32 in the sequence, counting real tokens.
      mask: [B, L] bool, False for padding; None where there is none. Read without a cache only.
      view: of the cache; None without one.
      bias: [1, H, L, M] float32 added to the scores, shared by a stack's layers; None for none.
    """

    positions: jax.Array
    mask: jax.Array | None
    view: CacheView | None
    bias: jax.Array | None

    def query_and_key_index(self) -> tuple[Int[Array, " L"], Int[Array, " M"]]:
        """[L] and [M] int32: where queries and keys stand in the row, or in the cache."""
        length = self.positions.shape[1]
        if self.view is None:
            return jnp.arange(length), jnp.arange(length)
        return self.view.start + jnp.arange(length), jnp.arange(self.view.filled.shape[1])


@dataclasses.dataclass
class AttentionConfig(Component, abc.ABC):
    """The contract: a component of a config that builds the attention of each block.

    What it builds is called with ([B, L, d], AttentionInputs, cache) and returns [B, L, d] and the
    cache with this call's tokens.
    """

    def validate(self, num_heads: int, head_width: int, path: str = "model") -> None:
        """Raises UserError for fields that cannot work; `path` is the stack's config."""

    @abc.abstractmethod
    def build(
        self,
        width: int,
        num_heads: int,
        head_width: int,
        scale: Scale,
        key: Key[Array, ""],
        causal: bool,
    ) -> Any:
        """Draws the parameters."""

    @abc.abstractmethod
    def empty_cache(
        self, batch: int, length: int, num_heads: int, head_width: int, dtype: Any
    ) -> Any:
        """A tree of arrays [B, M, ...], zeros."""

    @abc.abstractmethod
    def score_widths(self, head_width: int) -> tuple[int, int]:
        """Widths of a head's queries and of its values, for FLOP counts."""

    @property
    def shares_bias(self) -> bool:
        """Whether the stack has one table of relative biases for all its layers."""
        return False


class Positions(enum.StrEnum):
    """How attention knows positions.

    NONE: not at all. ROTARY: `rotate`. RELATIVE: `RelativeBias`, one table for all layers of a stack
    (T5). RELATIVE_PER_LAYER: a table in each layer (GLaM). TRANSFORMER_XL: `RelativeScores`.
    """

    NONE = "none"
    ROTARY = "rotary"
    RELATIVE = "relative"
    RELATIVE_PER_LAYER = "relative_per_layer"
    TRANSFORMER_XL = "transformer_xl"


class QKNorm(enum.StrEnum):
    """RMS norm of queries and keys: none, of each head (Qwen3, Soft MoE's), of all heads together as
    one vector (OLMoE)."""

    NONE = "none"
    HEAD = "head"
    FULL = "full"


@dataclasses.dataclass
class MultiHead(AttentionConfig):
    """Multi-head attention (Vaswani 2017), grouped-query where `kv_heads` is fewer (Ainslie 2023).

    Attributes:
      kv_heads: J, heads of keys and values, each for num_heads / J queries' heads; 0 for num_heads.
      positions: see `Positions`.
      rotary_base, rotary_scaling: of ROTARY.
      qk_norm: see `QKNorm`.
      norm_epsilon: of these norms.
      qkv_bias, out_bias: biases after the projections.
      scaled: divide scores by sqrt(h); T5 does not.
    """

    kv_heads: int = 0
    positions: Positions = Positions.ROTARY
    rotary_base: float = 10_000.0
    rotary_scaling: RotaryScaling = dataclasses.field(default_factory=RotaryScaling)
    qk_norm: QKNorm = QKNorm.NONE
    norm_epsilon: float = 1e-6
    qkv_bias: bool = False
    out_bias: bool = False
    scaled: bool = True

    def validate(self, num_heads: int, head_width: int, path: str = "model") -> None:
        """Raises UserError for heads that cannot be shared or rotated."""
        if self.kv_heads < 0 or (self.kv_heads and num_heads % self.kv_heads):
            raise UserError(
                f"{path}.attention.kv_heads is {self.kv_heads}, which does not divide "
                f"{path}.num_heads={num_heads}; use a divisor, or 0 for as many."
            )
        self.rotary_scaling.validate()
        if self.positions == Positions.ROTARY and head_width % 2:
            raise UserError(
                f"{path}.head_width is {head_width}; rotary positions need an even width."
            )

    def build(
        self,
        width: int,
        num_heads: int,
        head_width: int,
        scale: Scale,
        key: Key[Array, ""],
        causal: bool,
    ) -> "Attention":
        """See `AttentionConfig`.

        Raises:
          UserError: positions that need a causal model of even width, and it is none.
        """
        if self.positions == Positions.TRANSFORMER_XL and (not causal or width % 2):
            raise UserError(
                "attention.positions is transformer_xl, whose distances are to earlier tokens and "
                "whose sinusoids need an even width; use relative, or a causal model of even width."
            )
        return Attention(self, width, num_heads, head_width, scale, key, causal)

    def empty_cache(
        self, batch: int, length: int, num_heads: int, head_width: int, dtype: Any
    ) -> "KeyValues":
        """See `AttentionConfig`."""
        zeros = jnp.zeros((batch, length, self.kv_heads or num_heads, head_width), dtype)
        return KeyValues(zeros, zeros)

    def score_widths(self, head_width: int) -> tuple[int, int]:
        """See `AttentionConfig`; TRANSFORMER_XL multiplies queries with distances, too."""
        distances = head_width if self.positions == Positions.TRANSFORMER_XL else 0
        return head_width + distances, head_width

    @property
    def shares_bias(self) -> bool:
        """See `AttentionConfig`."""
        return self.positions == Positions.RELATIVE


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyValues:
    """Keys and values of the tokens seen so far, in one layer.

    Attributes:
      keys: [B, M, J, h] in the compute dtype, rotated.
      values: [B, M, J, h].
    """

    keys: jax.Array
    values: jax.Array


class Attention(nnx.Module):
    """softmax(q k / sqrt(h)) v: what `MultiHead` builds.

    A token sees itself and earlier ones, or all of its sequence where `causal` is False.

    Attributes:
      qkv: [d, 3, H, h] float32, where keys and values have as many heads as queries; else
      query: [d, H, h] and
      key_value: [d, 2, J, h].
      qkv_bias, query_bias, key_value_bias: the same without d, where there are biases.
      out: [H, h, d] float32, and out_bias: [d].
      query_norm, key_norm: where queries and keys are normalized.
      relative: the table or the projection of this layer's relative positions.
    """

    def __init__(
        self,
        config: MultiHead,
        width: int,
        num_heads: int,
        head_width: int,
        scale: Scale,
        key: Key[Array, ""],
        causal: bool,
    ) -> None:
        qkv_key, out_key = jax.random.split(key)
        kv_heads = config.kv_heads or num_heads
        self.config = nnx.static(config)
        self.causal = causal
        self.fused = kv_heads == num_heads
        if self.fused:
            qkv = scaled_truncated_normal(qkv_key, (width, 3, num_heads, head_width), width, scale)
            self.qkv = nnx.Param(qkv, axes=("embed", "qkv", "heads", "head"))
        else:
            query = scaled_truncated_normal(qkv_key, (width, num_heads, head_width), width, scale)
            shape = (width, 2, kv_heads, head_width)
            key_value = scaled_truncated_normal(jax.random.fold_in(qkv_key, 1), shape, width, scale)
            self.query = nnx.Param(query, axes=("embed", "heads", "head"))
            self.key_value = nnx.Param(key_value, axes=("embed", "qkv", "kv_heads", "head"))
        if config.qkv_bias and self.fused:
            bias = jnp.zeros((3, num_heads, head_width))
            self.qkv_bias = nnx.Param(bias, axes=("qkv", "heads", "head"))
        elif config.qkv_bias:
            self.query_bias = nnx.Param(jnp.zeros((num_heads, head_width)), axes=("heads", "head"))
            self.key_value_bias = nnx.Param(
                jnp.zeros((2, kv_heads, head_width)), axes=("qkv", "kv_heads", "head")
            )
        out = scaled_truncated_normal(
            out_key, (num_heads, head_width, width), num_heads * head_width, scale
        )
        self.out = nnx.Param(out, axes=("heads", "head", "embed"))
        if config.out_bias:
            self.out_bias = nnx.Param(jnp.zeros(width), axes=("norm",))
        if config.qk_norm != QKNorm.NONE:
            full = config.qk_norm == QKNorm.FULL
            epsilon = config.norm_epsilon
            self.query_norm = RMSNorm(head_width * (num_heads if full else 1), epsilon)
            self.key_norm = RMSNorm(head_width * (kv_heads if full else 1), epsilon)
        relative_key = jax.random.fold_in(key, 2)
        self.relative: RelativeBias | RelativeScores | None
        if config.positions == Positions.RELATIVE_PER_LAYER:
            self.relative = RelativeBias(num_heads, not causal, scale, relative_key)
        elif config.positions == Positions.TRANSFORMER_XL:
            self.relative = RelativeScores(width, num_heads, head_width, scale, relative_key)
        else:
            self.relative = None

    @jax.named_scope("attention")
    def __call__(
        self, x: Float[Array, "B L d"], inputs: AttentionInputs, cache: KeyValues | None = None
    ) -> tuple[Float[Array, "B L d"], KeyValues | None]:
        """[B, L, d] to [B, L, d], and the cache with this call's keys and values."""
        config: MultiHead = self.config
        query, key, value = self._projected(x)
        if config.qk_norm != QKNorm.NONE:
            query = self._normed(self.query_norm, query)
            key = self._normed(self.key_norm, key)
        if config.positions == Positions.ROTARY:
            rotary = (inputs.positions, config.rotary_base, config.rotary_scaling)
            query, key = rotate(query, *rotary), rotate(key, *rotary)
        mask = readable(x.shape[1], inputs)
        if cache is not None and inputs.view is not None:
            start = inputs.view.start
            key = jax.lax.dynamic_update_slice_in_dim(cache.keys, key, start, axis=1)
            value = jax.lax.dynamic_update_slice_in_dim(cache.values, value, start, axis=1)
            cache = KeyValues(key, value)
        scale = 1 / math.sqrt(query.shape[-1]) if config.scaled else 1.0
        scale *= config.rotary_scaling.of_scores
        attended = attend(
            query,
            key,
            value,
            bias=self._bias(query, inputs, scale),
            mask=mask,
            causal=self.causal and inputs.view is None,
            scale=scale,
        )
        return self._out(attended), cache

    def _projected(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, L, H, h], keys and values [B, L, J, h]."""
        dtype = x.dtype
        if self.fused:
            qkv = project(x, self.qkv[...])
            if self.config.qkv_bias:
                qkv = qkv + self.qkv_bias[...].astype(dtype)
            query, key, value = (
                constrain(part, "batch", "length", "heads", "head") for part in unstacked(qkv)
            )
            return query, key, value
        query = project(x, self.query[...])
        key_value = project(x, self.key_value[...])
        if self.config.qkv_bias:
            query = query + self.query_bias[...].astype(dtype)
            key_value = key_value + self.key_value_bias[...].astype(dtype)
        key, value = (
            constrain(part, "batch", "length", "kv_heads", "head") for part in unstacked(key_value)
        )
        return constrain(query, "batch", "length", "heads", "head"), key, value

    def _normed(self, norm: RMSNorm, x: jax.Array) -> jax.Array:
        if self.config.qk_norm == QKNorm.HEAD:
            return norm(x)
        return norm(x.reshape(*x.shape[:2], -1)).reshape(x.shape)

    def _bias(self, query: jax.Array, inputs: AttentionInputs, scale: float) -> jax.Array | None:
        """What is added to the scaled scores, [1 or B, H, L, M]."""
        if self.relative is None:
            return None if inputs.bias is None else inputs.bias.astype(query.dtype)
        query_index, key_index = inputs.query_and_key_index()
        if isinstance(self.relative, RelativeBias):
            return self.relative(query_index, key_index).astype(query.dtype)
        return scale * self.relative(query, query_index, key_index)

    def _out(self, attended: jax.Array) -> jax.Array:
        y = project(attended, self.out[...], contracted=2)
        return y + self.out_bias[...].astype(y.dtype) if self.config.out_bias else y


def unstacked(stack: Float[Array, "B L n J h"]) -> list[Float[Array, "B L J h"]]:
    """The n arrays that a product with stacked weights gives.

    Unlike an index's, a split's gradient is one concatenation, not n padded sums: with width 64 on a
    CPU these are a third of a step's time.
    """
    return [jnp.squeeze(part, 2) for part in jnp.split(stack, stack.shape[2], axis=2)]


def readable(length: int, inputs: AttentionInputs) -> Bool[Array, "B 1 _ M"] | None:
    """[B, 1, L or 1, M] bool, keys that may be read beside the causal rule; None for all.

    With a cache: positions that are filled and not after the query's own.
    """
    if inputs.view is None:
        return None if inputs.mask is None else inputs.mask[:, None, None, :]
    filled = inputs.view.filled
    query = inputs.view.start + jnp.arange(length)
    earlier = jnp.arange(filled.shape[1])[None, :] <= query[:, None]
    return (filled[:, None, :] & earlier[None])[:, None]
