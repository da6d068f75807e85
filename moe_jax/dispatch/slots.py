"""Dispatch through buffers of slots, which have the same size for every expert.

Axis letters
  G groups of this device    S tokens per group      K choices per token
  E experts                  C slots per expert      d width
  X devices along the axis   P slots per expert in Soft MoE
What no slot holds is dropped. How tokens get into slots and out again is a subclass's business:
`moe_jax.dispatch.gather.Gather` or `moe_jax.dispatch.einsum.Einsum`.
"""

import abc
import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.dispatch import soft
from moe_jax.dispatch.exchange import (
    Transport,
    Wire,
    from_expert_owners,
    gather_tokens,
    sum_to_owners,
    to_expert_owners,
)
from moe_jax.dispatch.interface import Dispatch, Experts
from moe_jax.errors import UserError
from moe_jax.routing.router import (
    Assignment,
    ExpertAssignment,
    Mean,
    Router,
    SoftAssignment,
    TokenAssignment,
)


@dataclasses.dataclass
class SlotDispatch(Dispatch):
    """Fill slots, exchange, experts, exchange, combine; a component of a config.

    Attributes:
      transport: how slots or tokens reach the experts' devices.
      wire: in which dtype.
    """

    transport: Transport = Transport.ALL_TO_ALL
    wire: Wire = Wire.COMPUTE

    @property
    def dropless(self) -> bool:
        """No: experts have a capacity."""
        return False

    def validate(self, router: Router) -> None:
        """Raises UserError for the ragged transport."""
        if self.transport == Transport.RAGGED:
            raise UserError(
                f"moe.dispatch.transport is ragged, but slots of {type(self).__name__} have a fixed "
                "size; use all_to_all or ring, or moe.dispatch = Dropless()."
            )

    @abc.abstractmethod
    def fill(
        self, x: Float[Array, "S d"], assignment: Assignment, num_experts: int
    ) -> Float[Array, "{num_experts} C d"]:
        """One group's tokens [S, d] into slots [E, C, d]; empty slots are 0."""

    @abc.abstractmethod
    def combine(
        self, buffers: Float[Array, "E C d"], assignment: Assignment, tokens: int
    ) -> Float[Array, "{tokens} d"]:
        """One group's outputs by slot [E, C, d] into those of its tokens [S, d], in float32 sums."""

    def apply(
        self,
        x: Float[Array, "G S d"],
        assignment: Assignment,
        token_index: Int[Array, "G S"],
        experts: Experts,
        axis: str,
    ) -> tuple[Float[Array, "G S d"], dict[str, Mean]]:
        """See `moe_jax.dispatch.interface.Dispatch`: [G, S, d] to [G, S, d]."""
        if self.transport == Transport.RING:
            return self._ring(x, assignment, token_index, experts, axis), {}
        groups = x.shape[0]
        with jax.named_scope("dispatch"):
            buffers, index = self._fill_groups(x, assignment, token_index, experts.num_experts)
            slots = buffers.shape[2]
            # The index is only read where an expert draws random numbers; otherwise the compiler
            # removes it.
            rows, rows_token = (
                to_expert_owners(buffers, axis, self.wire),
                to_expert_owners(index, axis),
            )
        outputs = experts.on_slots(rows, rows_token)
        with jax.named_scope("combine"):
            buffers = from_expert_owners(outputs, axis, groups, slots, self.wire)
            return self._combine_groups(buffers, assignment, x.shape[1]), {}

    def _ring(
        self,
        x: jax.Array,
        assignment: Assignment,
        token_index: jax.Array,
        experts: Experts,
        axis: str,
    ) -> jax.Array:
        with jax.named_scope("dispatch"):
            everyones, index = (gather_tokens(a, axis, self.wire) for a in (x, token_index))
            local = to_local(assignment, experts, axis)
            buffers, rows_token = self._fill_groups(everyones, local, index, experts.num_local)
            groups, here, slots, width = buffers.shape
            rows = buffers.swapaxes(0, 1).reshape(here, groups * slots, width)
            rows_token = rows_token.swapaxes(0, 1).reshape(here, groups * slots)
        outputs = experts.on_slots(rows, rows_token)
        with jax.named_scope("combine"):
            buffers = outputs.reshape(here, groups, slots, width).swapaxes(0, 1)
            return sum_to_owners(self._combine_groups(buffers, local, x.shape[1]), axis, self.wire)

    def _fill_groups(
        self, x: jax.Array, assignment: Assignment, token_index: jax.Array, num_experts: int
    ) -> tuple[jax.Array, jax.Array]:
        """Slots [G, E, C, d], and the token index of each [G, E, C]."""

        def group(
            x: jax.Array, assignment: Assignment, index: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            return self.fill(x, assignment, num_experts), slot_index(index, assignment, num_experts)

        return jax.vmap(group)(x, assignment, token_index)

    def _combine_groups(self, buffers: jax.Array, assignment: Assignment, tokens: int) -> jax.Array:
        return jax.vmap(lambda b, a: self.combine(b, a, tokens))(buffers, assignment)


def to_local(assignment: Assignment, experts: Experts, axis: str) -> Assignment:
    """What all devices' groups want of this device's experts, which are numbered from 0 here.

    Args:
      assignment: of this device's G groups.
      experts: of this device.
      axis: name of the mesh axis.

    Returns:
      Of X * G groups, in the order of devices.
    """
    if isinstance(assignment, TokenAssignment):
        everyones = jax.tree.map(lambda a: gather_tokens(a, axis), assignment)
        local = everyones.experts - experts.first
        mine = (local >= 0) & (local < experts.num_local)
        return dataclasses.replace(everyones, experts=jnp.where(mine, local, experts.num_local))

    # These have an expert axis, of which each device needs its own part only.
    def exchange(a: jax.Array, expert_axis: int) -> jax.Array:
        return jax.lax.all_to_all(a, axis, split_axis=expert_axis, concat_axis=0, tiled=True)

    if isinstance(assignment, ExpertAssignment):
        return jax.tree.map(lambda a: exchange(a, 1), assignment)
    return jax.tree.map(lambda a: exchange(a, 2), assignment)


def slot_table(
    assignment: TokenAssignment | ExpertAssignment, num_experts: int
) -> Int[Array, "{num_experts} C"]:
    """Which token sits in each slot of one group.

    Returns:
      [E, C] int32 token positions in the group; S (out of range) in empty slots.
    """
    if isinstance(assignment, ExpertAssignment):
        return assignment.tokens
    tokens, choices = assignment.experts.shape
    token = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32)[:, None], (tokens, choices))
    empty = jnp.full((num_experts, assignment.capacity), tokens, jnp.int32)
    return empty.at[assignment.experts, assignment.position_in_expert].set(token, mode="drop")


def slot_index(
    token_index: Int[Array, " S"], assignment: Assignment, num_experts: int
) -> Int[Array, "{num_experts} C"]:
    """[E, C] int32 index in the global batch of the token in each slot of one group."""
    if isinstance(assignment, SoftAssignment):
        return soft.slot_index(token_index, assignment)
    table = slot_table(assignment, num_experts)
    return token_index.at[table].get(mode="fill", fill_value=0)
