"""Slots filled by index: moving a token is a copy of its row.

Axis letters: S tokens per group, K choices per token, E experts, C slots per expert, d width.
One group.

Nothing of size S * E * C exists (compare `moe_jax.dispatch.einsum`). Only Soft MoE, where every
slot mixes all tokens, takes matrix products (`moe_jax.dispatch.soft`).
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.dispatch import soft
from moe_jax.dispatch.slots import SlotDispatch, slot_table
from moe_jax.routing.router import (
    Assignment,
    ExpertAssignment,
    SoftAssignment,
    TokenAssignment,
)


@dataclasses.dataclass
class Gather(SlotDispatch):
    """Copies rows by index; a component of a config."""

    def fill(
        self, x: Float[Array, "S d"], assignment: Assignment, num_experts: int
    ) -> Float[Array, "{num_experts} C d"]:
        """See `SlotDispatch.fill`."""
        if isinstance(assignment, SoftAssignment):
            return soft.fill(x, assignment)
        return x.at[slot_table(assignment, num_experts)].get(mode="fill", fill_value=0)

    def combine(
        self, buffers: Float[Array, "E C d"], assignment: Assignment, tokens: int
    ) -> Float[Array, "{tokens} d"]:
        """See `SlotDispatch.combine`."""
        if isinstance(assignment, SoftAssignment):
            return soft.combine(buffers, assignment)
        return combine(buffers, assignment, tokens)


def combine(
    buffers: Float[Array, "E C d"], assignment: TokenAssignment | ExpertAssignment, tokens: int
) -> Float[Array, "{tokens} d"]:
    """Gate-weighted sum of each token's expert outputs in one group.

    Args:
      buffers: [E, C, d] outputs by slot.
      assignment: of this group.
      tokens: S.

    Returns:
      [S, d] in the dtype of `buffers`, summed in float32.
    """
    if isinstance(assignment, ExpertAssignment):
        weighted = buffers.astype(jnp.float32) * assignment.gates[..., None]
        sums = jnp.zeros((tokens, buffers.shape[-1]))
        return sums.at[assignment.tokens].add(weighted, mode="drop").astype(buffers.dtype)
    # One choice after the other: XLA's CPU backend makes one slow serial loop of a gather of all
    # choices and its sum (at K = 2, 1.8 times the time of the whole layer's forward pass).
    sums = jnp.zeros((tokens, buffers.shape[-1]))
    for k in range(assignment.experts.shape[1]):
        places = (assignment.experts[:, k], assignment.position_in_expert[:, k])
        outputs = buffers.at[places].get(mode="fill", fill_value=0)
        sums = sums + outputs.astype(jnp.float32) * assignment.gates[:, k, None]
    return sums.astype(buffers.dtype)
