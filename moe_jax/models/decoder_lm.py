"""Language model of one stack of blocks, with a Mixture-of-Experts in every n-th.

Axis letters: B batch, L length, M cache length, d width, f feed-forward width, E experts,
V vocabulary.

Blocks repeat as one stacked period: `moe_every - 1` dense blocks and one MoE block, created by
`nnx.vmap` and run by `lax.scan`, so tracing time does not grow with depth. A stage is a run of
periods with equally many experts; a model has one stage unless `experts_by_layer` says otherwise.
"""

import dataclasses
import enum
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.errors import UserError
from moe_jax.layers.attention import Attention, CacheView, KeyValues
from moe_jax.layers.dropout import dropout
from moe_jax.layers.embedding import TokenEmbedding
from moe_jax.layers.feed_forward import FeedForward
from moe_jax.layers.mode import Mode
from moe_jax.layers.moe import MoE, MoEConfig, MoEReport, RouterState, TokenInfo
from moe_jax.layers.normalization import RMSNorm
from moe_jax.parallel.sharding import constrain


class ComputeDtype(enum.StrEnum):
    """Type of activations and of the weights they meet; parameters and routers stay float32."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class Remat(enum.StrEnum):
    """What the backward pass recomputes of each period: nothing, all but matrix products, all."""

    NONE = "none"
    DOTS = "dots"
    FULL = "full"


class SparseDense(enum.StrEnum):
    """Where a MoE block has a dense feed-forward layer besides: nowhere, before or after the MoE.

    ST-MoE section 4.3 and Table 16, "sparse-dense block"; the layer has its own norm and residual.
    """

    NONE = "none"
    BEFORE = "before"
    AFTER = "after"


@dataclasses.dataclass
class DecoderLMConfig:
    """A decoder-only language model, or a bidirectional one for masked-token objectives.

    Attributes:
      vocab_size: V, at least the tokenizer's.
      max_length: longest sequence the model is meant for, in training and decoding.
      num_layers: number of blocks; a multiple of `moe_every`.
      width: d.
      num_heads: attention heads.
      head_width: width of a head.
      mlp_width: f, of dense feed-forward layers and of each expert.
      num_experts: E.
      experts_by_layer: number of experts of each MoE layer, in place of `num_experts` (DeepSpeed's
        pyramid: 32, ..., 64); empty for the same everywhere.
      moe_every: every n-th block has a MoE in place of the feed-forward layer; 0 for a dense model.
      moe: how tokens are routed.
      sparse_dense: a dense feed-forward layer beside each MoE.
      bidirectional: tokens see later ones too; such a model cannot generate.
      accept_leak: let a decoder have a router through which tokens learn of later ones, as GLaM's and
        GShard's do when tokens are dropped. Its loss may then be better than it can generate.
      dropout: rate on embeddings, on each block's outputs and inside dense feed-forward layers.
      init_scale: s of the truncated normal with variance s / fan_in.
      dtype: compute dtype.
      remat: what to recompute in the backward pass.
      unroll: unroll the loop over periods (longer compilation; exact FLOP counts by XLA).
    """

    vocab_size: int = 264
    max_length: int = 256
    num_layers: int = 4
    width: int = 128
    num_heads: int = 4
    head_width: int = 32
    mlp_width: int = 512
    num_experts: int = 8
    experts_by_layer: tuple[int, ...] = ()
    moe_every: int = 2
    moe: MoEConfig = dataclasses.field(default_factory=MoEConfig)
    sparse_dense: SparseDense = SparseDense.NONE
    bidirectional: bool = False
    accept_leak: bool = False
    dropout: float = 0.0
    init_scale: float = 1.0
    dtype: ComputeDtype = ComputeDtype.FLOAT32
    remat: Remat = Remat.NONE
    unroll: bool = False

    @property
    def num_periods(self) -> int:
        """Number of repetitions of the stacked period."""
        return self.num_layers // max(self.moe_every, 1)

    @property
    def moe_layers(self) -> list[int]:
        """Indices of the blocks that have a MoE."""
        every = self.moe_every
        return list(range(every - 1, self.num_layers, every)) if every else []

    @property
    def experts_of_layers(self) -> list[int]:
        """Number of experts of each MoE layer."""
        return list(self.experts_by_layer) or [self.num_experts] * len(self.moe_layers)

    @property
    def stages(self) -> list[tuple[int, int]]:
        """(number of experts, number of periods) of each run of equal periods; 0 experts if dense."""
        experts = self.experts_of_layers if self.moe_every else [0] * self.num_periods
        return [(count, len(list(run))) for count, run in itertools.groupby(experts)]

    def validate(self) -> None:
        """Raises UserError for a model that could not be built."""
        for name in (
            "vocab_size", "max_length", "num_layers", "width", "num_heads", "head_width",
            "mlp_width",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise UserError(f"model.{name} is {getattr(self, name)}; it must be at least 1.")
        if self.moe_every < 0 or self.num_layers % max(self.moe_every, 1):
            raise UserError(
                f"model.moe_every is {self.moe_every}, which does not divide "
                f"model.num_layers={self.num_layers}; use a divisor, or 0 for a dense model."
            )
        if not self.init_scale > 0:
            raise UserError(f"model.init_scale is {self.init_scale}; it must be above 0.")
        if self.head_width % 2:
            raise UserError(
                f"model.head_width is {self.head_width}; rotary positions need an even width."
            )
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.dropout is {self.dropout}; it must be in [0, 1).")
        if self.moe_every:
            self._validate_moe()
            return
        for name in ("experts_by_layer", "sparse_dense"):
            if getattr(self, name) != getattr(DecoderLMConfig(), name):
                raise UserError(
                    f"model.{name} is {getattr(self, name)}, but model.moe_every is 0 and makes a "
                    "dense model; leave it out or set moe_every."
                )

    def _validate_moe(self) -> None:
        if self.experts_by_layer and len(self.experts_by_layer) != len(self.moe_layers):
            raise UserError(
                f"model.experts_by_layer has {len(self.experts_by_layer)} entries, but "
                f"{len(self.moe_layers)} blocks have a MoE; give one number for each."
            )
        name = "experts_by_layer" if self.experts_by_layer else "num_experts"
        if min(self.experts_of_layers) < 1:
            raise UserError(
                f"model.{name} is {getattr(self, name)}; it must be at least 1 everywhere."
            )
        for num_experts in sorted(set(self.experts_of_layers)):
            self.moe.validate(num_experts)
        leak = self.moe.router.leak
        if leak and not self.bidirectional and not self.accept_leak:
            raise UserError(
                f"model.moe.router is {type(self.moe.router).__name__}, with which a decoder would "
                f"look ahead: {leak}; use a causal router or order of service, a bidirectional "
                "model, or accept it with model.accept_leak=true."
            )

    def build(self, key: jax.Array) -> "DecoderLM":
        """Creates the model with freshly drawn parameters."""
        return DecoderLM(self, key)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """What decoding remembers.

    Attributes:
      layers: KeyValues of [periods, blocks per period, B, M, H, h].
      filled: [B, M] bool, cache positions that hold a real token.
      start: [] int32, next cache position.
    """

    layers: KeyValues
    filled: jax.Array
    start: jax.Array


class Block(nnx.Module):
    """Pre-normalised attention, then a feed-forward layer or a MoE."""

    def __init__(self, config: DecoderLMConfig, num_experts: int, key: jax.Array) -> None:
        """Draws the parameters; `num_experts` 0 makes a dense block."""
        attention_key, mlp_key = jax.random.split(key)
        width, mlp_width, scale = config.width, config.mlp_width, config.init_scale
        self.attention_norm = RMSNorm(width)
        self.attention = Attention(
            width,
            config.num_heads,
            config.head_width,
            scale,
            attention_key,
            causal=not config.bidirectional,
        )
        self.mlp_norm = RMSNorm(width)
        self.mlp: MoE | FeedForward
        if num_experts:
            self.mlp = MoE(config.moe, width, mlp_width, num_experts, scale, mlp_key)
        else:
            self.mlp = FeedForward(width, mlp_width, config.dropout, scale, mlp_key)
        has_dense = num_experts and config.sparse_dense != SparseDense.NONE
        self.dense = DenseSublayer(config, jax.random.fold_in(mlp_key, 4)) if has_dense else None
        self.dropout = config.dropout
        self.dense_first = config.sparse_dense == SparseDense.BEFORE

    def __call__(
        self,
        x: jax.Array,
        info: TokenInfo,
        padded: bool,
        mode: Mode,
        key: jax.Array | None,
        cache: KeyValues | None,
        view: CacheView | None,
    ) -> tuple[jax.Array, KeyValues | None, MoEReport | None]:
        """[B, L, d] to [B, L, d]; also the updated cache, and a MoE's report."""
        attention_key, mlp_key, out_key, dense_key = (
            (None,) * 4 if key is None else jax.random.split(key, 4)
        )
        attended, cache = self.attention(
            self.attention_norm(x), info.positions, info.mask if padded else None, cache, view
        )
        x = x + dropout(attended, self.dropout, attention_key)
        if self.dense is not None and self.dense_first:
            x = self.dense(x, dense_key)
        normed = self.mlp_norm(x)
        report = None
        if isinstance(self.mlp, MoE):
            with jax.named_scope("moe"):
                y, report = self.mlp(normed, info, mode, mlp_key)
        else:
            with jax.named_scope("feed_forward"):
                y = self.mlp(normed, mlp_key)
        x = constrain(x + dropout(y, self.dropout, out_key), "batch", "length", "width")
        if self.dense is not None and not self.dense_first:
            x = self.dense(x, dense_key)
        return x, cache, report


class DenseSublayer(nnx.Module):
    """The dense half of a sparse-dense block: x + dropout(feed_forward(norm(x)))."""

    def __init__(self, config: DecoderLMConfig, key: jax.Array) -> None:
        self.norm = RMSNorm(config.width)
        self.feed_forward = FeedForward(
            config.width, config.mlp_width, config.dropout, config.init_scale, key
        )
        self.dropout = config.dropout

    @jax.named_scope("feed_forward")
    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """[B, L, d] to [B, L, d]; `key` None switches dropout off."""
        inner_key, out_key = (None,) * 2 if key is None else jax.random.split(key)
        y = self.feed_forward(self.norm(x), inner_key)
        return constrain(x + dropout(y, self.dropout, out_key), "batch", "length", "width")


class Period(nnx.Module):
    """The blocks that repeat: dense ones, and a MoE block at the end."""

    def __init__(self, config: DecoderLMConfig, num_experts: int, key: jax.Array) -> None:
        count = max(config.moe_every, 1)
        self.blocks = nnx.List(
            Block(config, num_experts if i == count - 1 else 0, k)
            for i, k in enumerate(jax.random.split(key, count))
        )

    def __call__(
        self,
        x: jax.Array,
        info: TokenInfo,
        padded: bool,
        mode: Mode,
        key: jax.Array | None,
        caches: KeyValues | None,
        view: CacheView | None,
    ) -> tuple[jax.Array, KeyValues | None, MoEReport | None]:
        """Runs the blocks in order; caches are stacked over blocks."""
        report, new_caches = None, []
        for i, block in enumerate(self.blocks):
            block_key = None if key is None else jax.random.fold_in(key, i)
            cache = jax.tree.map(lambda a, i=i: a[i], caches)
            with jax.named_scope(f"block_{i}_of_{len(self.blocks)}"):
                x, cache, report = block(x, info, padded, mode, block_key, cache, view)
            new_caches.append(cache)
        stacked = jax.tree.map(lambda *a: jnp.stack(a), *new_caches)
        return x, stacked, report


class DecoderLM(nnx.Module):
    """The language model."""

    def __init__(self, config: DecoderLMConfig, key: jax.Array) -> None:
        token_key, period_key = jax.random.split(key)
        self.config = nnx.static(config)
        self.tokens = TokenEmbedding(config.vocab_size, config.width, 1.0, token_key)
        keys = jax.random.split(period_key, config.num_periods)
        starts = itertools.accumulate((count for _, count in config.stages), initial=0)
        self.stages = nnx.List(
            nnx.vmap(functools.partial(Period, config, num_experts))(keys[start : start + count])
            for start, (num_experts, count) in zip(starts, config.stages, strict=False)
        )
        self.norm = RMSNorm(config.width)

    def __call__(
        self,
        tokens: jax.Array,
        mask: jax.Array | None,
        mode: Mode,
        key: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> tuple[jax.Array, list[MoEReport], Cache | None]:
        """Predicts the next token everywhere (a bidirectional model: the masked ones).

        Args:
          tokens: [B, L] int32.
          mask: [B, L] bool, False for padding, which may be on either side; None for none.
          mode: what the pass is for.
          key: PRNG key of this step; None where nothing is random.
          cache: of earlier calls; the tokens continue where it stands.

        Returns:
          logits [B, L, V] float32; the MoE layers' reports, one for each stage with a leading axis
          over its periods (none for a dense model); the cache after this call (None if there was
          none).

        Raises:
          UserError: the sequence is longer than `max_length`.
        """
        config: DecoderLMConfig = self.config
        dtype = jnp.dtype(config.dtype)
        length = tokens.shape[1] if cache is None else cache.filled.shape[1]
        if length > config.max_length:
            raise UserError(
                f"model.max_length is {config.max_length}, but a sequence has {length} tokens; "
                "raise it or shorten the sequence."
            )
        if config.bidirectional and mode == Mode.DECODE:
            raise UserError(
                "model.bidirectional is true, and such a model cannot generate token by token; use "
                "a causal one."
            )
        padded = mask is not None
        mask = jnp.ones(tokens.shape, bool) if mask is None else mask
        view = None
        if cache is not None:
            filled = jax.lax.dynamic_update_slice_in_dim(cache.filled, mask, cache.start, axis=1)
            view = CacheView(cache.start, filled)
        info = _token_info(tokens, mask, cache)
        embed_key, period_key = (None,) * 2 if key is None else jax.random.split(key)

        x = self.tokens(tokens, dtype)
        x = dropout(constrain(x, "batch", "length", "width"), config.dropout, embed_key)
        reports, layers, start = [], [], 0
        for stage, (_, count) in zip(self.stages, config.stages, strict=True):
            with jax.named_scope(f"periods_{start}_to_{start + count}"):
                x, caches, report = self._run_stage(
                    stage, start, count, x, info, padded, mode, period_key, cache, view
                )
            layers.append(caches)
            start += count
            if report is not None:
                reports.append(report)
        if cache is not None and view is not None:
            stacked = jax.tree.map(lambda *a: jnp.concatenate(a), *layers)
            cache = Cache(stacked, view.filled, cache.start + tokens.shape[1])
        return self.tokens.logits(self.norm(x)), reports, cache

    def _run_stage(
        self,
        stage: Period,
        start: int,
        count: int,
        x: jax.Array,
        info: TokenInfo,
        padded: bool,
        mode: Mode,
        key: jax.Array | None,
        cache: Cache | None,
        view: CacheView | None,
    ) -> tuple[jax.Array, KeyValues | None, MoEReport | None]:
        """Scans over the `count` periods of a stage, the first of which is period `start`."""
        config: DecoderLMConfig = self.config
        definition, values = nnx.split(stage)

        def period(x: jax.Array, scanned: Any) -> tuple[jax.Array, Any]:
            values, index, caches = scanned
            k = None if key is None else jax.random.fold_in(key, index)
            module = nnx.merge(definition, values)
            x, caches, report = module(x, info, padded, mode, k, caches, view)
            return x, (caches, report, nnx.state(module, RouterState))

        caches = None if cache is None else cache.layers
        x, (caches, report, router_states) = jax.lax.scan(
            _rematerialized(period, config.remat),
            x,
            (
                values,
                jnp.arange(start, start + count),
                jax.tree.map(lambda a: a[start : start + count], caches),
            ),
            unroll=count if config.unroll else 1,
        )
        if mode == Mode.TRAIN:
            nnx.update(stage, router_states)
        return x, caches, report

    def empty_cache(self, batch: int, length: int) -> Cache:
        """A cache for `batch` sequences of up to `length` tokens, padding included."""
        config: DecoderLMConfig = self.config
        blocks = max(config.moe_every, 1)
        shape = (
            config.num_periods, blocks, batch, length, config.num_heads, config.head_width
        )  # fmt: skip
        zeros = jnp.zeros(shape, config.dtype)
        return Cache(
            KeyValues(zeros, zeros), jnp.zeros((batch, length), bool), jnp.zeros((), jnp.int32)
        )


def _token_info(tokens: jax.Array, mask: jax.Array, cache: Cache | None) -> TokenInfo:
    """Positions count real tokens only, so that left padding changes nothing."""
    before = 0 if cache is None else cache.filled.sum(axis=1, keepdims=True, dtype=jnp.int32)
    positions = jnp.maximum(before + jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
    rows = jnp.arange(tokens.shape[0], dtype=jnp.int32)[:, None]
    return TokenInfo(mask, tokens, positions, jnp.broadcast_to(rows, tokens.shape))


def _rematerialized(function: Any, remat: Remat) -> Any:
    if remat == Remat.NONE:
        return function
    policy = (
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == Remat.DOTS else None
    )
    return jax.checkpoint(function, policy=policy)
