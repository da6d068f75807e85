"""A block of a transformer: a list of sub-layers, and the form in which they are added up.

Axis letters: B batch, L length, M memory or cache length, H heads, d width.
"""

import abc
import dataclasses
import enum
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
from flax import nnx

from moe_jax.component import Component
from moe_jax.layers.attention import AttentionInputs, CacheView, KeyValues, MultiHead
from moe_jax.layers.cross_attention import CrossAttention
from moe_jax.layers.dropout import dropout
from moe_jax.layers.feed_forward import FeedForward
from moe_jax.layers.mode import Mode
from moe_jax.layers.moe import MoE, MoEConfig, MoEReport, TokenInfo
from moe_jax.layers.normalization import LayerNorm, RMSNorm, make_norm
from moe_jax.parallel.sharding import constrain

if TYPE_CHECKING:
    from moe_jax.models.stack import StackConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pass:
    """One pass through a stack: what every block knows beside the vectors.

    Attributes:
      info: of each token, for routers and positions.
      mode: what the pass is for.
      key: PRNG key of this step and place; None where nothing is random.
      mask: [B, L] bool, False for padding; None where there is none. Read without a cache only.
      view: of the cache; None without one.
      memory: [B, M, d] what cross-attention reads; None without it, and where a cache has it.
      memory_mask: [B, M] bool, False for the memory's padding; None for none.
      bias: [1, H, L, M] of self-attention, if the layers share one.
    """

    info: TokenInfo
    mode: Mode = dataclasses.field(metadata={"static": True})
    key: jax.Array | None = None
    mask: jax.Array | None = None
    view: CacheView | None = None
    memory: jax.Array | None = None
    memory_mask: jax.Array | None = None
    bias: jax.Array | None = None

    def fold(self, place: jax.Array | int) -> "Pass":
        """The same pass at one of several places, with a key of its own.

        Of a stack the places are the indices of its blocks, and of a block its sub-layers' roles.
        """
        if self.key is None:
            return self
        return dataclasses.replace(self, key=jax.random.fold_in(self.key, place))

    def dropout(self, x: jax.Array, rate: float, place: int) -> jax.Array:
        """Dropout of x [B, L, d] with the key of a place."""
        return dropout(x, rate, self.fold(place).key)

    def keys(self, count: int) -> Sequence[jax.Array | None]:
        """So many keys; None each where nothing is random."""
        return [None] * count if self.key is None else list(jax.random.split(self.key, count))

    @property
    def attention_inputs(self) -> AttentionInputs:
        """What self-attention is given."""
        return AttentionInputs(self.info.positions, self.mask, self.view, self.bias)


@dataclasses.dataclass(frozen=True)
class Out:
    """What a sub-layer gives.

    Attributes:
      y: [B, L, d] to be added to the residual stream.
      cache: what self-attention remembers now; None of other sub-layers.
      report: of a MoE; None of other sub-layers.
    """

    y: jax.Array
    cache: Any = None
    report: MoEReport | None = None


@dataclasses.dataclass(frozen=True)
class Sublayer:
    """A layer and the norm that belongs before it, for one pass.

    Attributes:
      norm: [B, L, d] to [B, L, d].
      layer: [B, L, d] to an `Out`, dropout included.
    """

    norm: Callable[[jax.Array], jax.Array]
    layer: Callable[[jax.Array], Out]


class BlockForm(Component, abc.ABC):
    """How sub-layers make a block; a component of a config, so that a block can be of one's own."""

    @property
    def own_norms(self) -> bool:
        """Whether each sub-layer has a norm of its own; otherwise all have the first one's."""
        return True

    @abc.abstractmethod
    def __call__(self, x: jax.Array, sublayers: Sequence[Sublayer]) -> tuple[jax.Array, list[Out]]:
        """[B, L, d] to [B, L, d], and what each sub-layer gave, in their order."""


@dataclasses.dataclass
class PreNorm(BlockForm):
    """Each sub-layer reads a norm of what those before it made: x + layer(norm(x))."""

    def __call__(self, x: jax.Array, sublayers: Sequence[Sublayer]) -> tuple[jax.Array, list[Out]]:
        """See `BlockForm`."""
        outs = []
        for sublayer in sublayers:
            outs.append(sublayer.layer(sublayer.norm(x)))
            x = x + outs[-1].y
        return x, outs


@dataclasses.dataclass
class Parallel(BlockForm):
    """All sub-layers read one norm of the block's input (GPT-J; PaLM, section 2)."""

    @property
    def own_norms(self) -> bool:
        """No: the block has one norm."""
        return False

    def __call__(self, x: jax.Array, sublayers: Sequence[Sublayer]) -> tuple[jax.Array, list[Out]]:
        """See `BlockForm`."""
        normed = sublayers[0].norm(x)
        outs = [sublayer.layer(normed) for sublayer in sublayers]
        return sum((out.y for out in outs), start=x), outs


class Role(enum.IntEnum):
    """What a sub-layer is: the place, within a block's key, of the sub-layer's own.

    Parameters, dropout and router noise so depend on the index of a block and on the role only, and
    models of one seed share what they have in common, whatever else is in their blocks.
    """

    ATTENTION = 0
    CROSS_ATTENTION = 1
    FEED_FORWARD = 2
    MOE = 3


class SparseDense(enum.StrEnum):
    """Where a MoE block has a dense feed-forward layer besides: nowhere, before or after the MoE.

    ST-MoE section 4.3 and Table 16, "sparse-dense block"; the layer has its own norm and residual.
    """

    NONE = "none"
    BEFORE = "before"
    AFTER = "after"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockCache:
    """What a block remembers.

    Attributes:
      attention: the self-attention's, see `AttentionConfig.empty_cache`.
      memory: keys and values of cross-attention; None without it.
    """

    attention: Any
    memory: KeyValues | None


class Block(nnx.Module):
    """Self-attention, cross-attention if there is a memory, and a feed-forward layer or a MoE."""

    def __init__(
        self,
        config: "StackConfig",
        moe: MoEConfig,
        num_experts: int,
        causal: bool,
        cross: bool,
        key: jax.Array,
    ) -> None:
        """Draws the parameters.

        Args:
          config: of the stack.
          moe: of this block's MoE.
          num_experts: E; 0 makes a dense block.
          causal: tokens see themselves and earlier ones only.
          cross: the block also attends to a memory.
          key: PRNG key of the block.
        """
        keys = {role: jax.random.fold_in(key, role) for role in Role}
        width, scale = config.width, config.scale
        heads = (config.num_heads, config.head_width)
        self.config = nnx.static(config)
        self.attention_norm = make_norm(config.norm, width, config.norm_epsilon)

        def norm() -> RMSNorm | LayerNorm | None:
            """A further sub-layer's own norm, if the form gives it one."""
            own = config.block.own_norms
            return make_norm(config.norm, width, config.norm_epsilon) if own else None

        self.attention = config.attention.build(width, *heads, scale, keys[Role.ATTENTION], causal)
        self.cross_norm = norm() if cross else None
        scaled = not isinstance(config.attention, MultiHead) or config.attention.scaled
        self.cross_attention = (
            CrossAttention(width, *heads, scaled, scale, keys[Role.CROSS_ATTENTION])
            if cross
            else None
        )
        self.mlp_norm = norm()
        self.mlp: MoE | FeedForward
        if num_experts:
            expert_width = config.expert_width or config.mlp_width
            self.mlp = MoE(moe, width, expert_width, num_experts, scale, keys[Role.MOE])
        else:
            self.mlp = _feed_forward(config, keys[Role.FEED_FORWARD])
        has_dense = num_experts and config.sparse_dense != SparseDense.NONE
        self.dense: Any = nnx.data(
            {
                "norm": norm(),
                "feed_forward": _feed_forward(config, keys[Role.FEED_FORWARD]),
            }
            if has_dense
            else None
        )

    def __call__(
        self, x: jax.Array, this_pass: Pass, cache: BlockCache | None
    ) -> tuple[jax.Array, BlockCache | None, MoEReport | None]:
        """[B, L, d] to [B, L, d]; also the updated cache, and a MoE's report."""
        x, outs = self.config.block(x, self.sublayers(this_pass, cache))
        if cache is not None:
            cache = dataclasses.replace(cache, attention=outs[0].cache)
        report = next((out.report for out in outs if out.report is not None), None)
        return constrain(x, "batch", "length", "width"), cache, report

    def sublayers(self, this_pass: Pass, cache: BlockCache | None) -> list[Sublayer]:
        """The block's sub-layers in their order, self-attention first."""
        rate = self.config.dropout

        def attend(x: jax.Array) -> Out:
            own = None if cache is None else cache.attention
            y, own = self.attention(x, this_pass.attention_inputs, own)
            return Out(this_pass.dropout(y, rate, Role.ATTENTION), own)

        def attend_to_memory(x: jax.Array) -> Out:
            attention: Any = self.cross_attention
            memory = None if cache is None else cache.memory
            if memory is None:
                memory = attention.keys_and_values(this_pass.memory)
            y = attention(x, memory, this_pass.memory_mask)
            return Out(this_pass.dropout(y, rate, Role.CROSS_ATTENTION))

        def feed_to_experts(x: jax.Array) -> Out:
            moe: Any = self.mlp
            inner, outer = this_pass.fold(Role.MOE).keys(2)
            with jax.named_scope("moe"):
                y, report = moe(x, this_pass.info, this_pass.mode, inner)
            return Out(dropout(y, rate, outer), report=report)

        @jax.named_scope("feed_forward")
        def feed(x: jax.Array) -> Out:
            layer: Any = self.mlp if self.dense is None else self.dense["feed_forward"]
            inner, outer = this_pass.fold(Role.FEED_FORWARD).keys(2)
            return Out(dropout(layer(x, inner), rate, outer))

        first = self.attention_norm
        found = [Sublayer(first, attend)]
        if self.cross_attention is not None:
            found.append(Sublayer(self.cross_norm or first, attend_to_memory))
        sparse = isinstance(self.mlp, MoE)
        found.append(Sublayer(self.mlp_norm or first, feed_to_experts if sparse else feed))
        if self.dense is not None:
            before = self.config.sparse_dense == SparseDense.BEFORE
            place = len(found) - 1 if before else len(found)
            found.insert(place, Sublayer(self.dense["norm"] or first, feed))
        return found


def _feed_forward(config: "StackConfig", key: jax.Array) -> FeedForward:
    return FeedForward(
        config.width, config.mlp_width, config.feed_forward, config.dropout, config.scale, key
    )
