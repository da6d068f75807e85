"""Matrix products of a MoE layer.

Axis letters: T tokens, K choices per token, E experts, X devices along the expert axis, S tokens per
group, C slots per expert and group (P of Soft MoE), d width.
"""

import math
from collections.abc import Mapping
from typing import Any

from moe_jax.analysis.accounting.costs import count
from moe_jax.analysis.accounting.machine import Machine
from moe_jax.analysis.accounting.products import Product
from moe_jax.analysis.accounting.stack import products_with
from moe_jax.dispatch.dropless import Dropless
from moe_jax.dispatch.einsum import Einsum
from moe_jax.dispatch.exchange import Transport
from moe_jax.layers.expert_form import ModuleForm
from moe_jax.layers.moe import MoEConfig
from moe_jax.layers.shared_experts import BranchMix
from moe_jax.parallel.mesh import EXPERT, MODEL
from moe_jax.routing.soft import SoftMoE


def of_moe(
    moe: MoEConfig,
    num_experts: int,
    width: int,
    shapes: Mapping[str, Any],
    tokens: int,
    machine: Machine,
) -> list[Product]:
    """One layer's products.

    Experts that are modules count as one product with each of their arrays. Left out: experts' biases, and tiles of rows that two experts share in grouped products, which a
    kernel multiplies once for each.

    Args:
      moe: the layer.
      num_experts: E.
      width: d.
      shapes: of the layer's parameters, without a leading axis of layers.
      tokens: T, of the global batch.
      machine: what it is compiled for.
    """
    router = shapes.get("router", {})
    learned = count(router) > 0
    rows = moe.expert_rows(num_experts)
    # Routing and mixing are done once by each device of `model`, with the same tokens.
    everyones = tokens * machine.mesh[MODEL]
    routing = Product(2.0 * everyones * products_with(router))
    fill, combine = _mixing(moe, num_experts, width, everyones, learned)
    is_module = isinstance(moe.experts, ModuleForm)
    up = tuple(moe.experts.axes()) if is_module else ("w_in", "w_gate")
    empty = _empty_rows(moe, num_experts, machine)

    def experts(names: tuple[str, ...], residual: bool) -> Product:
        weights = {name: shapes[name] for name in names if name in shapes}
        each = 2.0 * tokens * count(weights) / num_experts
        return Product(rows * each, batched=True, residual=residual, skipped=empty * each)

    return [
        routing,
        *fill,
        experts(up, residual=False),
        # The gradient of the gates reads the experts' outputs.
        experts(("w_out",), residual=not learned),
        *combine,
        *_shared(moe, shapes.get("shared", {}), tokens),
    ]


def _mixing(
    moe: MoEConfig, num_experts: int, width: int, tokens: int, learned: bool
) -> tuple[list[Product], list[Product]]:
    """Products with [S, E, C] weights of tokens in slots, into the slots and out again."""
    soft = isinstance(moe.router, SoftMoE)
    if not soft and not isinstance(moe.dispatch, Einsum):
        return [], []
    slots = num_experts * moe.expert_capacity(num_experts, train=True)
    flops = 2.0 * tokens * slots * width
    # One-hot masks have no gradient; weights that are gates have one.
    return (
        [Product(flops, 1.0 + (soft and learned), batched=True)],
        [Product(flops, 1.0 + learned, batched=True, residual=True)],
    )


def _shared(moe: MoEConfig, shapes: Mapping[str, Any], tokens: int) -> list[Product]:
    """The dense branch that every token visits."""
    if not shapes:
        return []
    dense = shapes["dense"]
    return [
        *feed_forward(dense, tokens, residual=moe.shared_mix == BranchMix.SUM),
        Product(2.0 * tokens * count(shapes.get("mix", {}))),
    ]


def feed_forward(shapes: Mapping[str, Any], tokens: int, residual: bool) -> list[Product]:
    """Of a dense feed-forward network; `residual`: what it gives is only added to something."""
    up = {name: shapes[name] for name in ("w_in", "w_gate") if name in shapes}
    return [
        Product(2.0 * tokens * count(up)),
        Product(2.0 * tokens * count(shapes["w_out"]), residual=residual),
    ]


def _empty_rows(moe: MoEConfig, num_experts: int, machine: Machine) -> float:
    """Rows of the kernels' buffers beyond those of balanced experts, for each token."""
    dispatch, shards = moe.dispatch, machine.mesh[EXPERT]
    if not isinstance(dispatch, Dropless) or machine.platform == "cpu":
        return 0.0
    choices, factor = moe.router.choices, dispatch.buffer_factor or math.inf
    received: float = shards
    if shards == 1:
        received = 1
    elif dispatch.transport != Transport.RING:
        received = min(shards, factor * min(choices, shards))
    room = min(received * min(choices, num_experts // shards), factor * choices)
    return room - choices
