"""The transformer that the model families share: a stack of blocks, with a MoE in some of them.

Axis letters: B batch, L length, M memory or cache length, d width, f feed-forward width, E experts.

Blocks repeat as stacked periods (such as one dense block and one MoE block), created by `nnx.vmap`
and run by `lax.scan`, so that tracing time does not grow with depth. A stage is a run of equal
periods; `stages_of` finds the fewest blocks to trace. Keys follow the index of a block in the stack,
whatever the stages: a dense and a sparse model of one seed share the weights of what they share.
"""

import dataclasses
import enum
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.component import Component, field
from moe_jax.errors import UserError
from moe_jax.layers.attention import (
    AttentionConfig,
    KeyValues,
    MultiHead,
)
from moe_jax.layers.feed_forward import FeedForwardForm
from moe_jax.layers.initializers import Deviation, Scale
from moe_jax.layers.mode import Mode
from moe_jax.layers.moe import MoEConfig, MoEReport, RouterState
from moe_jax.layers.normalization import Norm
from moe_jax.layers.positions import RelativeBias
from moe_jax.models.blocks import Block, BlockCache, BlockForm, Pass, PreNorm, SparseDense


class ComputeDtype(enum.StrEnum):
    """Type of activations and of the weights they meet; parameters and routers stay float32."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class Remat(enum.StrEnum):
    """What the backward pass recomputes of each period: nothing, all but matrix products, all."""

    NONE = "none"
    DOTS = "dots"
    FULL = "full"


MOST_LAYERS = 1024  # `stages_of` takes seconds for so many; for 10 million it would not end.


@dataclasses.dataclass(frozen=True)
class Stage:
    """A run of equal periods.

    Attributes:
      first: index of its first block.
      experts: E of each block of the period, 0 for dense ones; at most one block has a MoE.
      count: how often the period is repeated.
      rule: index of the rule in `StackConfig.moe_rules` that its MoE follows; -1 for `moe`.
    """

    first: int
    experts: tuple[int, ...]
    count: int
    rule: int = -1

    @property
    def blocks(self) -> range:
        """Indices of its blocks."""
        return range(self.first, self.first + self.count * len(self.experts))

    @property
    def firsts(self) -> range:
        """Indices of the first blocks of the periods."""
        return self.blocks[:: len(self.experts)]

    @property
    def moe_blocks(self) -> list[int]:
        """Indices of the blocks that have a MoE."""
        experts = self.experts * self.count
        return [
            block for block, num_experts in zip(self.blocks, experts, strict=True) if num_experts
        ]


def stages_of(experts: Sequence[int], rules: Sequence[int] = ()) -> list[Stage]:
    """Cuts blocks into stages such that the periods have the fewest blocks in all.

    Args:
      experts: E of each block, 0 for dense ones.
      rules: of each block, see `Stage.rule`; empty for -1 everywhere.
    """
    kinds = list(zip(experts, rules or [-1] * len(experts), strict=True))
    # Best cut of the blocks from each one on: (blocks to trace, stages).
    best: dict[int, tuple[int, list[Stage]]] = {len(experts): (0, [])}
    for first in reversed(range(len(experts))):
        cuts = []
        of_moes: list[int] = []
        for length in range(1, len(experts) - first + 1):
            num_experts, rule = kinds[first + length - 1]
            of_moes += [rule] if num_experts else []
            if len(of_moes) > 1:
                break
            if length > 1 and not of_moes:
                continue  # Equal blocks are never better as longer periods.
            period = kinds[first : first + length]
            rule = of_moes[0] if of_moes else -1
            count, stop = 0, first
            while kinds[stop : stop + length] == period:
                count, stop = count + 1, stop + length
                traced, rest = best[stop]
                stage = Stage(first, tuple(num_experts for num_experts, _ in period), count, rule)
                cuts.append((length + traced, len(rest), [stage, *rest]))
        # Of equal cuts the one with fewer stages, and then the longer first stage.
        traced, _, stages = min(cuts, key=lambda cut: (cut[0], cut[1], -cut[2][0].count))
        best[first] = (traced, stages)
    return best[0][1]


@dataclasses.dataclass
class MoERule(Component):
    """Other MoE settings for some blocks (hash routing in the first layers, more experts per token).

    Attributes:
      blocks: indices of the blocks it is for, which have a MoE.
      moe: their settings; groups are those of `StackConfig.moe`.
    """

    blocks: tuple[int, ...] = ()
    moe: MoEConfig = dataclasses.field(default_factory=MoEConfig)


@dataclasses.dataclass
class StackConfig(Component):
    """A stack of blocks.

    Attributes:
      num_layers: number of blocks.
      width: d.
      num_heads: attention heads.
      head_width: width of a head.
      mlp_width: f, of dense feed-forward layers and, unless `expert_width` is given, of each expert.
      attention: which kind of self-attention.
      feed_forward: form of the dense feed-forward layers; `moe.experts` is the experts'.
      norm: before attention, feed-forward layer and MoE.
      norm_epsilon: added to the variance.
      num_experts: E.
      experts_by_layer: number of experts of each MoE layer, in place of `num_experts` (DeepSpeed's
        pyramid: 32, ..., 64); empty for the same everywhere.
      expert_width: f of each expert, 0 for `mlp_width`.
      moe_every: every n-th block has a MoE in place of the feed-forward layer; 0 for a dense model.
      moe_at: indices of the blocks that have a MoE, in place of `moe_every`.
      moe: how tokens are routed.
      moe_rules: other settings for some of the blocks that have a MoE; the last rule that names a
        block counts.
      sparse_dense: a dense feed-forward layer beside each MoE.
      dropout: rate on embeddings, on each block's outputs and inside dense feed-forward layers.
      init_scale: s of the truncated normal with variance s / fan_in.
      init_deviation: standard deviation of all matrices in place of `init_scale`; 0 for none.
      dtype: compute dtype.
      remat: what to recompute in the backward pass.
      unroll: unroll the loop over periods (longer compilation; exact FLOP counts by XLA).
      block: how sub-layers make a block: `PreNorm`, `Parallel`, or a `BlockForm` of one's own.
    """

    num_layers: int = field(4, at_least=1, at_most=MOST_LAYERS)
    width: int = field(128, at_least=1)
    num_heads: int = field(4, at_least=1)
    head_width: int = field(32, at_least=1)
    mlp_width: int = field(512, at_least=1)
    attention: AttentionConfig = dataclasses.field(default_factory=MultiHead)
    feed_forward: FeedForwardForm = dataclasses.field(default_factory=FeedForwardForm)
    norm: Norm = Norm.RMS
    norm_epsilon: float = field(1e-6, at_least=0)
    num_experts: int = 8
    experts_by_layer: tuple[int, ...] = ()
    expert_width: int = field(0, at_least=0)
    moe_every: int = 2
    moe_at: tuple[int, ...] = ()
    moe: MoEConfig = dataclasses.field(default_factory=MoEConfig)
    sparse_dense: SparseDense = SparseDense.NONE
    dropout: float = field(0.0, at_least=0, below=1)
    init_scale: float = field(1.0, above=0)
    init_deviation: float = field(0.0, at_least=0)
    dtype: ComputeDtype = ComputeDtype.FLOAT32
    remat: Remat = Remat.NONE
    unroll: bool = False
    block: BlockForm = dataclasses.field(default_factory=PreNorm)
    moe_rules: tuple[MoERule, ...] = ()

    @property
    def sparse(self) -> bool:
        """Whether any block has a MoE."""
        return bool(self.moe_at) or self.moe_every > 0

    @property
    def moe_layers(self) -> list[int]:
        """Indices of the blocks that have a MoE."""
        every = self.moe_every
        if self.moe_at:
            return list(self.moe_at)
        return list(range(every - 1, self.num_layers, every)) if every else []

    @property
    def experts_of_layers(self) -> list[int]:
        """Number of experts of each MoE layer."""
        return list(self.experts_by_layer) or [self.num_experts] * len(self.moe_layers)

    def rule_of(self, block: int) -> int:
        """Index of the rule that a block's MoE follows; -1 for `moe`."""
        return max((i for i, rule in enumerate(self.moe_rules) if block in rule.blocks), default=-1)

    def moe_of(self, rule: int) -> MoEConfig:
        """The settings of the MoEs that follow a rule, with the groups of `moe`."""
        if rule < 0:
            return self.moe
        shared = self.moe
        return dataclasses.replace(
            self.moe_rules[rule].moe, group_size=shared.group_size, group_rows=shared.group_rows
        )

    @property
    def moe_settings(self) -> list[MoEConfig]:
        """The settings that some block's MoE has, each once."""
        return [self.moe_of(rule) for rule in sorted({self.rule_of(b) for b in self.moe_layers})]

    @property
    def stages(self) -> list[Stage]:
        """How the blocks repeat."""
        experts = dict(zip(self.moe_layers, self.experts_of_layers, strict=True))
        blocks = range(self.num_layers)
        of_blocks = [experts.get(block, 0) for block in blocks]
        rules = [self.rule_of(block) if experts.get(block, 0) else -1 for block in blocks]
        return stages_of(of_blocks, rules)

    @property
    def scale(self) -> Scale:
        """How matrices start."""
        return Deviation(self.init_deviation) if self.init_deviation else self.init_scale

    def split_dimensions(self, path: str = "model") -> list[tuple[str, int, str]]:
        """See `ModelConfig`; `path` is the config's own."""
        name = "experts_by_layer" if self.experts_by_layer else "num_experts"
        return [
            (f"{path}.num_heads", self.num_heads, "model"),
            *(
                [(f"{path}.attention.kv_heads", self.attention.kv_heads, "model")]
                if isinstance(self.attention, MultiHead) and self.attention.kv_heads
                else []
            ),
            (f"{path}.mlp_width", self.mlp_width, "model"),
            *([(f"{path}.expert_width", self.expert_width, "model")] if self.expert_width else []),
            *((f"{path}.{name}", num_experts, "expert") for num_experts in self.experts_of_layers),
        ]

    def validate(self, path: str = "model") -> None:
        """Raises UserError for a stack that could not be built; `path` is the config's own."""
        self.check_ranges(path)
        if self.moe_every < 0:
            raise UserError(
                f"{path}.moe_every is {self.moe_every}; it must be at least 1, or 0 for a dense model."
            )
        if not self.moe_at and self.num_layers % max(self.moe_every, 1):
            raise UserError(
                f"{path}.moe_every is {self.moe_every}, which does not divide "
                f"{path}.num_layers={self.num_layers}; use a divisor, or 0 for a dense model."
            )
        self.attention.validate(self.num_heads, self.head_width, path)
        if self.sparse:
            self._validate_moe(path)
            return
        for name in ("experts_by_layer", "sparse_dense", "moe_rules"):
            if getattr(self, name) != getattr(StackConfig(), name):
                raise UserError(
                    f"{path}.{name} is {getattr(self, name)}, but {path}.moe_every is 0 and makes a "
                    "dense model; leave it out or set moe_every."
                )

    def _validate_moe(self, path: str) -> None:
        blocks = self.moe_at
        if blocks and (sorted(set(blocks)) != list(blocks) or not self._has_blocks(blocks)):
            raise UserError(
                f"{path}.moe_at is {blocks}; it must be ascending indices of blocks below "
                f"{path}.num_layers={self.num_layers}."
            )
        if self.experts_by_layer and len(self.experts_by_layer) != len(self.moe_layers):
            raise UserError(
                f"{path}.experts_by_layer has {len(self.experts_by_layer)} entries, but "
                f"{len(self.moe_layers)} blocks have a MoE; give one number for each."
            )
        name = "experts_by_layer" if self.experts_by_layer else "num_experts"
        if min(self.experts_of_layers) < 1:
            raise UserError(
                f"{path}.{name} is {getattr(self, name)}; it must be at least 1 everywhere."
            )
        for i, rule in enumerate(self.moe_rules):
            self._validate_rule(f"{path}.moe_rules[{i}]", rule)
        for block, num_experts in zip(self.moe_layers, self.experts_of_layers, strict=True):
            number = self.rule_of(block)
            name = "moe" if number < 0 else f"moe_rules[{number}].moe"
            self.moe_of(number).validate(num_experts, f"{path}.{name}")

    def _validate_rule(self, name: str, rule: MoERule) -> None:
        dense = sorted(set(rule.blocks) - set(self.moe_layers))
        if dense or not rule.blocks:
            raise UserError(
                f"{name}.blocks is {rule.blocks}; it must name some of the blocks that have a MoE, "
                f"{self.moe_layers}."
            )
        ours, default = rule.moe, MoEConfig()
        for field_name in ("group_size", "group_rows"):
            value, shared = getattr(ours, field_name), getattr(self.moe, field_name)
            if value not in (shared, getattr(default, field_name)):
                raise UserError(
                    f"{name}.moe.{field_name} is {value}, but all layers route in the same groups, "
                    f"and moe.{field_name} is {shared}; leave it out."
                )

    def _has_blocks(self, blocks: Sequence[int]) -> bool:
        return blocks[0] >= 0 and blocks[-1] < self.num_layers


class Period(nnx.Module):
    """The blocks that repeat."""

    def __init__(
        self,
        config: StackConfig,
        stage: Stage,
        causal: bool,
        cross: bool,
        key: jax.Array,
        first: jax.Array,
    ) -> None:
        """Draws the parameters with the stack's key; `first` as of a call."""
        self.blocks = nnx.List(
            Block(
                config,
                config.moe_of(stage.rule),
                num_experts,
                causal,
                cross,
                jax.random.fold_in(key, first + i),
            )
            for i, num_experts in enumerate(stage.experts)
        )

    def __call__(
        self, x: jax.Array, this_pass: Pass, first: jax.Array, caches: list[BlockCache] | None
    ) -> tuple[jax.Array, list[BlockCache] | None, MoEReport | None]:
        """Runs the blocks in order, of which `first` is the first's index in the stack.

        At most one of them has a report.
        """
        report = None
        new_caches: list[Any] = []
        for i, block in enumerate(self.blocks):
            cache = None if caches is None else caches[i]
            with jax.named_scope(f"block_{i}_of_{len(self.blocks)}"):
                x, cache, block_report = block(x, this_pass.fold(first + i), cache)
            report = report if block_report is None else block_report
            new_caches.append(cache)
        return x, None if caches is None else new_caches, report


# Of each stage a list over the period's blocks, with a leading axis over its repetitions.
StackCache = list[list[BlockCache]]


class Stack(nnx.Module):
    """The blocks.

    Attributes:
      relative: the table of relative positions that all layers share, if they do.
    """

    def __init__(
        self, config: StackConfig, key: jax.Array, causal: bool, cross: bool = False
    ) -> None:
        """Draws the parameters.

        Args:
          config: the stack.
          key: PRNG key.
          causal: tokens see themselves and earlier ones only.
          cross: the blocks also attend to a memory.
        """
        self.config = nnx.static(config)
        blocks_key, relative_key = jax.random.split(key)
        self.stages = nnx.List(
            nnx.vmap(functools.partial(Period, config, stage, causal, cross, blocks_key))(
                jnp.array(stage.firsts)
            )
            for stage in config.stages
        )
        self.relative = (
            RelativeBias(config.num_heads, not causal, config.scale, relative_key)
            if config.attention.shares_bias
            else None
        )

    def __call__(
        self, x: jax.Array, this_pass: Pass, cache: StackCache | None = None
    ) -> tuple[jax.Array, list[MoEReport], StackCache | None]:
        """Runs all blocks; the final norm is the model's.

        Args:
          x: [B, L, d] in the compute dtype.
          this_pass: see `Pass`; the stack adds the bias that its layers share.
          cache: of earlier calls.

        Returns:
          [B, L, d]; the MoE layers' reports, one for each stage that has some, with a leading axis
          over them; the cache after this call.
        """
        if self.relative is not None:
            bias = self.relative(*this_pass.attention_inputs.query_and_key_index())
            this_pass = dataclasses.replace(this_pass, bias=bias)
        reports, caches = [], []
        for i, stage in enumerate(self.config.stages):
            with jax.named_scope(f"blocks_{stage.first}_to_{stage.blocks.stop}"):
                x, stage_cache, report = self._run_stage(
                    i, stage, x, this_pass, None if cache is None else cache[i]
                )
            caches.append(stage_cache)
            if report is not None:
                reports.append(report)
        return x, reports, None if cache is None else caches

    def _run_stage(
        self, i: int, stage: Stage, x: jax.Array, this_pass: Pass, caches: list[BlockCache] | None
    ) -> tuple[jax.Array, Any, MoEReport | None]:
        """Scans over the periods of the stack's stage `i`."""
        config: StackConfig = self.config
        definition, values = nnx.split(self.stages[i])

        def period(x: jax.Array, scanned: Any) -> tuple[jax.Array, Any]:
            values, first, caches = scanned
            module = nnx.merge(definition, values)
            x, caches, report = module(x, this_pass, first, caches)
            return x, (caches, report, nnx.state(module, RouterState))

        x, (caches, report, router_states) = jax.lax.scan(
            _rematerialized(period, config.remat),
            x,
            (values, jnp.array(stage.firsts), caches),
            unroll=stage.count if config.unroll else 1,
        )
        if this_pass.mode == Mode.TRAIN:
            nnx.update(self.stages[i], router_states)
        return x, caches, report

    def empty_cache(self, batch: int, length: int, memory: jax.Array | None = None) -> StackCache:
        """A cache for `batch` sequences of up to `length` tokens, padding included.

        Args:
          batch: B.
          length: M of self-attention.
          memory: [B, M, d] what cross-attention reads: its keys and values are computed here.
        """
        config: StackConfig = self.config
        attention = config.attention.empty_cache(
            batch, length, config.num_heads, config.head_width, jnp.dtype(config.dtype)
        )
        return [
            [
                BlockCache(
                    jax.tree.map(
                        lambda a, n=stage.count: jnp.broadcast_to(a, (n, *a.shape)), attention
                    ),
                    None if memory is None else _memories(block.cross_attention, memory),
                )
                for block in period.blocks
            ]
            for stage, period in zip(config.stages, self.stages, strict=True)
        ]


def _memories(stacked: Any, memory: jax.Array) -> KeyValues:
    """Keys and values of the memory by every repetition of a block: [count, B, M, H, h]."""
    definition, values = nnx.split(stacked)
    return jax.lax.map(lambda v: nnx.merge(definition, v).keys_and_values(memory), values)


def _rematerialized(function: Any, remat: Remat) -> Any:
    if remat == Remat.NONE:
        return function
    policy = (
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == Remat.DOTS else None
    )
    return jax.checkpoint(function, policy=policy)
