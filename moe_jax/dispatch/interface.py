"""What every dispatch does: bring tokens to their experts and the outputs back."""

from collections.abc import Callable
from typing import Protocol

import jax

from moe_jax.routing.assignment import Assignment

# (rows [experts here, rows, d], global token index of each row [experts here, rows]) -> outputs.
Experts = Callable[[jax.Array, jax.Array], jax.Array]


class Dispatch(Protocol):
    """A component of a config; runs inside the MoE layer's shard_map."""

    def apply(
        self,
        x: jax.Array,
        assignment: Assignment,
        token_index: jax.Array,
        experts: Experts,
        num_experts: int,
        axis: str,
    ) -> jax.Array:
        """Runs every token of this device through its experts.

        Args:
          x: [G, S, d] this device's tokens, in groups.
          assignment: the router's, lifted over G.
          token_index: [G, S] int32 index of each token in the global batch.
          experts: the feed-forward networks of this device's experts.
          num_experts: E, over all devices.
          axis: mesh axis that the experts are split over.

        Returns:
          [G, S, d], 0 for tokens that no expert served.
        """
