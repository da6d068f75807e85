"""What a router is given and what it returns.

Axis letters
  S tokens in a group        K choices per token      E experts
  C slots per expert         d model width
Everything here and in the routers is written for ONE group; callers lift it over groups with
`jax.vmap`, and no result depends on how groups are laid out over devices.
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

register = jax.tree_util.register_dataclass


@register
@dataclasses.dataclass(frozen=True)
class RouterInputs:
    """Everything a router may look at.

    Attributes:
      x: [S, d] the layer's input, in the compute dtype.
      mask: [S] bool, False for padding: it takes no slot and enters no loss or statistic.
      token_ids: [S] int32 vocabulary ids (hash routers).
      positions: [S] int32 positions within their sequences.
      sequence_ids: [S] int32, equal for tokens of one sequence (sequence-wise losses).
      key: PRNG key of this group, layer and step, or None when nothing is random. It is folded
        with the global index of the group, so draws do not depend on the mesh.
      train: whether exploration noise and other training-only behaviour is on.
    """

    x: jax.Array
    mask: jax.Array
    token_ids: jax.Array
    positions: jax.Array
    sequence_ids: jax.Array
    key: jax.Array | None
    train: bool = dataclasses.field(metadata={"static": True})


@register
@dataclasses.dataclass(frozen=True)
class TokenChoice:
    """Each token chose K experts.

    Attributes:
      experts: [S, K] int32 chosen experts.
      slots: [S, K] int32 slot in the chosen expert's buffer; `capacity` if the assignment was
        dropped. Out of range on the high side on purpose: -1 would wrap around.
      gates: [S, K] float32 weights of the experts' outputs.
      capacity: C, slots per expert.
    """

    experts: jax.Array
    slots: jax.Array
    gates: jax.Array
    capacity: int = dataclasses.field(metadata={"static": True})


# What routers may answer; expert-choice and soft assignments join here.
Assignment = TokenChoice


@register
@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean that is still a (sum, count) pair, so that it can be summed over groups and devices.

    Attributes:
      total: [...] float32 sum.
      count: [] float32 number of things summed.
    """

    total: jax.Array
    count: jax.Array

    @classmethod
    def of(cls, values: jax.Array, mask: jax.Array) -> "Mean":
        """Mean over the leading axis of `values` [S, ...] where `mask` [S] is True."""
        weights = mask.astype(jnp.float32)
        # A sum of products and not a matrix product, which TPUs would round to bfloat16.
        weighted = values.astype(jnp.float32) * weights.reshape(-1, *[1] * (values.ndim - 1))
        return cls(weighted.sum(axis=0), weights.sum())

    def value(self) -> jax.Array:
        """total / count, and 0 where nothing was counted."""
        return self.total / jnp.maximum(self.count, 1.0)


@register
@dataclasses.dataclass(frozen=True)
class Routing:
    """A router's answer for one group.

    Attributes:
      assignment: where tokens go; the dispatch reads it.
      losses: name -> Mean, before any coefficient.
      statistics: name -> Mean, without gradient.
    """

    assignment: Assignment
    losses: dict[str, Mean]
    statistics: dict[str, Mean]


class Router(Protocol):
    """The contract: a configuration object with pure methods.

    A new router is one dataclass with these members and a line in a config
    (`config.model.moe.router = MyRouter()`); no caller changes.
    """

    @property
    def causal(self) -> bool:
        """Whether a token's output never depends on later tokens of its sequence."""

    @property
    def choices(self) -> int:
        """K, experts per token."""

    @property
    def loss_weights(self) -> dict[str, float]:
        """Coefficient of each entry of `Routing.losses`."""

    def validate(self, num_experts: int) -> None:
        """Raises UserError where the fields cannot work with E experts."""

    def init(self, key: jax.Array, width: int, num_experts: int) -> dict[str, jax.Array]:
        """The router's parameters by name, float32, of any shapes; every device has them whole."""

    def route(
        self,
        parameters: dict[str, jax.Array],
        inputs: RouterInputs,
        num_experts: int,
        capacity: int,
    ) -> Routing:
        """Routes one group."""
