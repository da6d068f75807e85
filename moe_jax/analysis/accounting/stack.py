"""Costs of a transformer stack, from its config and the shapes of its parameters.

Axis letters: H heads, E experts, d width, S tokens per group, P slots per expert in Soft MoE.
"""

import dataclasses
from typing import Any

import jax

from moe_jax.analysis.accounting.costs import count
from moe_jax.layers.moe import MoEConfig
from moe_jax.models.stack import StackConfig
from moe_jax.routing.soft import SoftMoE

# Names of parameters, or of modules with parameters, that no token is multiplied with as a matrix.
_NO_PRODUCTS = ("bias", "norm", "relative", "scale", "b_")


@dataclasses.dataclass(frozen=True)
class ExpertCost:
    """The experts of one MoE layer.

    Attributes:
      num_experts: E.
      parameters: of each.
      products: those of them that are in matrices.
      visited: experts whose work the papers count for a token.
      rows: rows that all experts together work on in training, for each token.
    """

    num_experts: int
    parameters: int
    products: int
    visited: float
    rows: float


@dataclasses.dataclass(frozen=True)
class StackCost:
    """Costs of all layers of a stack, for each token.

    Attributes:
      products: multiply-adds with parameters, without routers and routed experts.
      memory_products: of each token of the memory, for cross-attention.
      routers: multiply-adds of the routers, and of mixing tokens in Soft MoE.
      experts: of each MoE layer.
      scores: FLOPs of self-attention for each position that a token attends to.
      memory_scores: FLOPs of cross-attention for each position of the memory.
    """

    products: int
    memory_products: int
    routers: float
    experts: tuple[ExpertCost, ...]
    scores: float
    memory_scores: float

    def algorithmic(self, attended: float, memory: float = 0.0) -> float:
        """FLOPs per token that attends to so many positions on average, and to the memory's."""
        visited = sum(layer.products * layer.visited for layer in self.experts)
        return 2 * (self.products + visited) + self._scores(attended, memory)

    def executed(self, attended: float, memory: float = 0.0) -> float:
        """The same as the machine does it."""
        rows = sum(layer.products * layer.rows for layer in self.experts)
        return 2 * (self.products + rows + self.routers) + self._scores(attended, memory)

    @property
    def unvisited_parameters(self) -> float:
        """Of the experts that a token did not choose."""
        return sum(layer.parameters * (layer.num_experts - layer.visited) for layer in self.experts)

    def _scores(self, attended: float, memory: float) -> float:
        return self.scores * attended + self.memory_scores * memory


def of_stack(config: StackConfig, shapes: Any) -> StackCost:
    """Counts the stack with these parameters (of a AbstractModel, the stack's own subtree)."""
    products = memory_products = 0
    routers = memory_scores = 0.0
    experts: list[ExpertCost] = []
    for stage, period in zip(config.stages, shapes["stages"].values(), strict=True):
        for num_experts, block in zip(stage.experts, period["blocks"].values(), strict=True):
            block = dict(block)
            mlp = block.pop("mlp")
            if num_experts:
                mlp = dict(mlp)
                router = mlp.pop("router", {})
                moe = config.moe_of(stage.rule)
                of_experts = {name: mlp.pop(name) for name in moe.expert_form.axes()}
                layer = _experts(moe, num_experts, stage.count, of_experts)
                experts += [layer] * stage.count
                routers += products_with(router) + stage.count * _mixing(config.width, moe, layer)
            block["mlp"] = mlp
            cross = block.pop("cross_attention", None) or {}
            memory_products += count(cross.get("key_value", {}))
            products += products_with({name: w for name, w in cross.items() if name != "key_value"})
            products += products_with(block)
            if cross:
                memory_scores += stage.count * 4 * config.num_heads * config.head_width
    widths = sum(config.attention.score_widths(config.head_width))
    scores = 2.0 * config.num_layers * config.num_heads * widths
    return StackCost(products, memory_products, routers, tuple(experts), scores, memory_scores)


def _experts(moe: MoEConfig, num_experts: int, layers: int, shapes: Any) -> ExpertCost:
    slots = moe.expert_capacity(num_experts, train=True)
    return ExpertCost(
        num_experts,
        count(shapes) // (num_experts * layers),
        products_with(shapes) // (num_experts * layers),
        moe.router.experts_per_token(moe.group_size, num_experts, slots),
        moe.expert_rows(num_experts),
    )


def _mixing(width: int, moe: MoEConfig, layer: ExpertCost) -> float:
    """Multiply-adds for each token of Soft MoE's two mixtures, each of S * E * P * d for a group."""
    if not isinstance(moe.router, SoftMoE):
        return 0.0
    return 2 * width * layer.rows * moe.group_size


def products_with(shapes: Any) -> int:
    """Multiply-adds for each token of a tree of parameters."""
    total = 0
    for path, leaf in jax.tree.leaves_with_path(shapes):
        names = [str(getattr(entry, "key", "")) for entry in path]
        if not any(part in name for name in names for part in _NO_PRODUCTS):
            total += count(leaf)
    return total


def statistics_bytes_per_layer(num_experts: int, num_losses: int) -> int:
    """Bytes that a token-choice layer's losses and statistics add to the step's all-reduces.

    (sum, count) pairs: load has E + 1 floats; the losses and three scalar statistics have 2 each.
    """
    return 4 * (num_experts + 1 + (num_losses + 3) * 2)
