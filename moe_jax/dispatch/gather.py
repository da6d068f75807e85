"""Buffers of slots: tokens are copied or mixed into them, experts work, outputs are weighted back.

Axis letters
  G groups of this device    S tokens per group      K choices per token
  E experts                  C slots per expert      d width
Moving a token is a gather of its row, so nothing of size S * E * C exists (compare GShard's one-hot
einsum, whose cost grows with S * E * C * d). What no slot holds is dropped. Only Soft MoE, where
every slot mixes all tokens, takes matrix products (`moe_jax.dispatch.soft`).
"""

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.dispatch import exchange, soft
from moe_jax.dispatch.interface import Experts
from moe_jax.routing.assignment import (
    Assignment,
    ExpertAssignment,
    SoftAssignment,
    TokenAssignment,
)


@dataclasses.dataclass
class Gather:
    """Dispatch, exchange, experts, exchange, combine; a component of a config."""

    def apply(
        self,
        x: jax.Array,
        assignment: Assignment,
        token_index: jax.Array,
        experts: Experts,
        num_experts: int,
        axis: str,
    ) -> jax.Array:
        """See `moe_jax.dispatch.interface.Dispatch`: [G, S, d] to [G, S, d]."""
        groups, tokens, _ = x.shape

        def into_slots(x: jax.Array, index: jax.Array, assignment: Assignment) -> list[jax.Array]:
            if isinstance(assignment, SoftAssignment):
                return [soft.fill(x, assignment), soft.slot_index(index, assignment)]
            table = slot_table(assignment, num_experts)
            return [fill(x, table), fill(index, table)]

        def out_of_slots(buffers: jax.Array, assignment: Assignment) -> jax.Array:
            if isinstance(assignment, SoftAssignment):
                return soft.combine(buffers, assignment)
            return combine(buffers, assignment, tokens)

        # The index is only read where an expert draws random numbers; otherwise the compiler
        # removes it.
        buffers, index = jax.vmap(into_slots)(x, token_index, assignment)
        outputs = experts(
            exchange.to_expert_owners(buffers, axis), exchange.to_expert_owners(index, axis)
        )
        buffers = exchange.from_expert_owners(outputs, axis, groups, buffers.shape[2])
        return jax.vmap(out_of_slots)(buffers, assignment)


def slot_table(assignment: TokenAssignment | ExpertAssignment, num_experts: int) -> jax.Array:
    """Which token sits in each slot of one group.

    Returns:
      [E, C] int32 token positions in the group; S (out of range) in empty slots.
    """
    if isinstance(assignment, ExpertAssignment):
        return assignment.tokens
    tokens, choices = assignment.experts.shape
    token = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32)[:, None], (tokens, choices))
    empty = jnp.full((num_experts, assignment.capacity), tokens, jnp.int32)
    return empty.at[assignment.experts, assignment.slots].set(token, mode="drop")


def fill(values: jax.Array, table: jax.Array) -> jax.Array:
    """Copies `values` [S, ...] into slots by `table` [E, C]; empty slots are 0.

    Returns:
      [E, C, ...].
    """
    return values.at[table].get(mode="fill", fill_value=0)


def combine(
    buffers: jax.Array, assignment: TokenAssignment | ExpertAssignment, tokens: int
) -> jax.Array:
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
    outputs = buffers.at[assignment.experts, assignment.slots].get(mode="fill", fill_value=0)
    # A sum of products and not a matrix product, which TPUs would round to bfloat16.
    weighted = outputs.astype(jnp.float32) * assignment.gates[..., None]
    return weighted.sum(axis=1).astype(buffers.dtype)
