"""Capacity dispatch by index gather: experts work on buffers of C slots, overflow is dropped.

Axis letters
  G groups of this device    S tokens per group      K choices per token
  E experts                  C slots per expert      d width
Moving a token is a gather of its row, so nothing of size S * E * C exists (compare GShard's one-hot
einsum, whose cost grows with S * E * C * d).
"""

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.dispatch import exchange
from moe_jax.dispatch.interface import Experts
from moe_jax.routing.assignment import TokenChoice


@dataclasses.dataclass
class Gather:
    """Dispatch, exchange, experts, exchange, combine; a component of a config."""

    def apply(
        self,
        x: jax.Array,
        assignment: TokenChoice,
        token_index: jax.Array,
        experts: Experts,
        num_experts: int,
        axis: str,
    ) -> jax.Array:
        """See `moe_jax.dispatch.interface.Dispatch`: [G, S, d] to [G, S, d]."""
        table = jax.vmap(slot_table, in_axes=(0, None))(assignment, num_experts)
        rows = exchange.to_expert_owners(jax.vmap(fill)(x, table), axis)
        # Only read where an expert draws random numbers; otherwise the compiler removes this.
        rows_index = exchange.to_expert_owners(jax.vmap(fill)(token_index, table), axis)
        outputs = experts(rows, rows_index)
        buffers = exchange.from_expert_owners(outputs, axis, x.shape[0], assignment.capacity)
        return jax.vmap(combine)(buffers, assignment)


def slot_table(assignment: TokenChoice, num_experts: int) -> jax.Array:
    """Which token sits in each slot of one group.

    Returns:
      [E, C] int32 token positions in the group; S (out of range) in empty slots.
    """
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


def combine(buffers: jax.Array, assignment: TokenChoice) -> jax.Array:
    """Gate-weighted sum of each token's expert outputs in one group.

    Args:
      buffers: [E, C, d] outputs by slot.
      assignment: of this group.

    Returns:
      [S, d] in the dtype of `buffers`, summed in float32.
    """
    outputs = buffers.at[assignment.experts, assignment.slots].get(mode="fill", fill_value=0)
    # A sum of products and not a matrix product, which TPUs would round to bfloat16.
    weighted = outputs.astype(jnp.float32) * assignment.gates[..., None]
    return weighted.sum(axis=1).astype(buffers.dtype)
