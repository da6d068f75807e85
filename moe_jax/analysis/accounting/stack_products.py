"""Matrix products of a training step through a transformer stack.

Axis letters: B batch, L length, M length of the memory.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from moe_jax.analysis.accounting.attention_products import Scores
from moe_jax.analysis.accounting.costs import count
from moe_jax.analysis.accounting.machine import Machine
from moe_jax.analysis.accounting.moe_products import feed_forward, of_moe
from moe_jax.analysis.accounting.products import Cost, Product, Sublayer, cost
from moe_jax.analysis.accounting.stack import products_with
from moe_jax.layers.attention import MultiHead, Positions
from moe_jax.models.stack import SparseDense, StackConfig


@dataclasses.dataclass(frozen=True)
class TokenRows:
    """What a stack runs on.

    Attributes:
      batch: B, of the global batch.
      length: L.
      causal: tokens see themselves and earlier ones only.
      memory: M of cross-attention; 0 without it.
      padded: attention masks padding, of the memory too.
    """

    batch: int
    length: int
    causal: bool
    memory: int = 0
    padded: bool = False

    @property
    def tokens(self) -> int:
        """B * L."""
        return self.batch * self.length


def of_stack(config: StackConfig, shapes: Any, rows: TokenRows, machine: Machine) -> Cost:
    """Counts the stack with these parameters (of a AbstractModel, the stack's own subtree)."""
    total = Cost(0.0, 0.0)
    for stage, period in zip(config.stages, shapes["stages"].values(), strict=True):
        sublayers: list[Sublayer] = []
        for num_experts, block in zip(stage.experts, period["blocks"].values(), strict=True):
            one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), block)
            sublayers += _of_block(config, stage.rule, num_experts, one, rows, machine)
        repeated = [[product.times(stage.count) for product in layer] for layer in sublayers]
        total += cost(repeated, config.remat)
    return total


def _of_block(
    config: StackConfig,
    rule: int,
    num_experts: int,
    shapes: Mapping[str, Any],
    rows: TokenRows,
    machine: Machine,
) -> list[Sublayer]:
    """The sublayers of a block, each of which is added to the residual stream, in their order."""
    sublayers: list[Sublayer] = [_of_attention(config, shapes["attention"], rows, machine)]
    if "cross_attention" in shapes:
        sublayers.append(_of_cross_attention(config, shapes["cross_attention"], rows, machine))
    mlp: Sublayer = (
        of_moe(config.moe_of(rule), num_experts, config.width, shapes["mlp"], rows.tokens, machine)
        if num_experts
        else feed_forward(shapes["mlp"], rows.tokens, residual=True)
    )
    if "dense" not in shapes:
        return [*sublayers, mlp]
    dense = feed_forward(shapes["dense"]["feed_forward"], rows.tokens, residual=True)
    first = config.sparse_dense == SparseDense.BEFORE
    return [*sublayers, *((dense, mlp) if first else (mlp, dense))]


def _of_attention(
    config: StackConfig, shapes: Mapping[str, Any], rows: TokenRows, machine: Machine
) -> Sublayer:
    attention = config.attention
    kv_heads, positions = config.num_heads, Positions.NONE
    if isinstance(attention, MultiHead):
        kv_heads, positions = attention.kv_heads or kv_heads, attention.positions
    scores = Scores(
        rows.batch,
        rows.length,
        rows.length,
        config.num_heads,
        kv_heads,
        *attention.score_widths(config.head_width),
        rows.causal,
        biased=positions not in (Positions.NONE, Positions.ROTARY),
        padded=rows.padded,
        dtype=config.dtype.value,
    )
    inwards = {name: leaf for name, leaf in shapes.items() if name != "out"}
    sublayer = [
        Product(2.0 * rows.tokens * products_with(inwards)),
        scores.product(machine),
        Product(2.0 * rows.tokens * count(shapes["out"]), residual=True),
    ]
    if positions == Positions.TRANSFORMER_XL:
        # Of every distance, by each device that has tokens; the sinusoids have no gradient.
        keys = 2.0 * rows.length * count(shapes["relative"]["projection"])
        sublayer.insert(0, Product(machine.token_shards * keys, backward=1.0))
    return sublayer


def _of_cross_attention(
    config: StackConfig, shapes: Mapping[str, Any], rows: TokenRows, machine: Machine
) -> Sublayer:
    heads, width = config.num_heads, config.head_width
    scores = Scores(
        rows.batch,
        rows.length,
        rows.memory,
        heads,
        heads,
        width,
        width,
        causal=False,
        biased=False,
        padded=rows.padded,
        dtype=config.dtype.value,
    )
    return [
        Product(2.0 * rows.batch * rows.memory * count(shapes["key_value"])),
        Product(2.0 * rows.tokens * count(shapes["query"])),
        scores.product(machine),
        Product(2.0 * rows.tokens * count(shapes["out"]), residual=True),
    ]
