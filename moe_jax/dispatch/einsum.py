"""Slots filled by one-hot matrix products, as GShard and Mesh TensorFlow do; for study.

Axis letters: S tokens per group, K choices per token, E experts, C slots per expert, d width.
One group.

The masks [S, E, C] are a mixture in which every slot holds one token whole, so the products are
those of Soft MoE: 4 * S * E * C * d operations, S / f of what the experts' own take at capacity
factor 1 and f their width. `moe_jax.dispatch.gather` gives the same result without them.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.dispatch import soft
from moe_jax.dispatch.slots import SlotDispatch
from moe_jax.routing.router import (
    Assignment,
    ExpertAssignment,
    SoftAssignment,
    TokenAssignment,
)


@dataclasses.dataclass
class Einsum(SlotDispatch):
    """Multiplies with one-hot masks; a component of a config."""

    def fill(
        self, x: Float[Array, "S d"], assignment: Assignment, num_experts: int
    ) -> Float[Array, "{num_experts} C d"]:
        """See `SlotDispatch.fill`."""
        return soft.fill(x, as_masks(assignment, x.shape[0], num_experts))

    def combine(
        self, buffers: Float[Array, "E C d"], assignment: Assignment, tokens: int
    ) -> Float[Array, "{tokens} d"]:
        """See `SlotDispatch.combine`."""
        return soft.combine(buffers, as_masks(assignment, tokens, buffers.shape[0]))


def as_masks(assignment: Assignment, tokens: int, num_experts: int) -> SoftAssignment:
    """Any assignment as one-hot masks: dispatch of 0 and 1, combine of 0 and gates, [S, E, C]."""
    match assignment:
        case TokenAssignment():
            expert = jax.nn.one_hot(assignment.experts, num_experts)  # [S, K, E]
            slot = jax.nn.one_hot(assignment.position_in_expert, assignment.capacity)  # [S, K, C]
            gated = expert * assignment.gates[..., None]
            return SoftAssignment(_masks(expert, slot), _masks(gated, slot))
        case ExpertAssignment():
            places = jax.nn.one_hot(assignment.tokens, tokens, axis=0)  # [S, E, C]
            return SoftAssignment(places, places * assignment.gates)
        case SoftAssignment():
            return assignment


def _masks(expert: jax.Array, slot: jax.Array) -> jax.Array:
    return jnp.einsum("ske,skc->sec", expert, slot, precision=jax.lax.Precision.HIGHEST)
