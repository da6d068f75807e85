"""What a router is given and what it returns.

Axis letters
  S tokens in a group        K choices per token      E experts
  C slots per expert         P slots per expert in Soft MoE
  d model width
Everything here and in the routers is written for ONE group; callers lift it over groups with
`jax.vmap`, and no result depends on how groups are laid out over devices.
"""

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, Shaped

from moe_jax.component import Component, factors_of
from moe_jax.routing.capacity import Capacity

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
      sequence_ids: [S] int32, equal for tokens of one sequence, which are consecutive
        (sequence-wise losses).
      key: PRNG key of this group, layer and step. It is folded with the global index of the group,
        so draws do not depend on the mesh. In evaluation it is the same in every step and layer.
        Draw with it once and with `fold_in(key, n)` again; `split` may give one of those keys.
      shared_key: PRNG key of this layer and step, the same for all groups.
      train: whether exploration noise and other training-only behaviour is on.
    """

    x: jax.Array
    mask: jax.Array
    token_ids: jax.Array
    positions: jax.Array
    sequence_ids: jax.Array
    key: jax.Array
    shared_key: jax.Array
    train: bool = dataclasses.field(metadata={"static": True})


@register
@dataclasses.dataclass(frozen=True)
class TokenAssignment:
    """Each token chose up to K experts.

    Attributes:
      experts: [S, K] int32 chosen experts, the first choice first; E (out of range) where a token
        made fewer than K choices.
      position_in_expert: [S, K] int32 slot in the chosen expert's buffer; `capacity` if the assignment was
        dropped. Out of range on the high side on purpose: -1 would wrap around.
      gates: [S, K] float32 weights of the experts' outputs.
      capacity: C, slots per expert.
    """

    experts: jax.Array
    position_in_expert: jax.Array
    gates: jax.Array
    capacity: int = dataclasses.field(metadata={"static": True})


@register
@dataclasses.dataclass(frozen=True)
class ExpertAssignment:
    """Each expert chose up to C tokens.

    Attributes:
      tokens: [E, C] int32 chosen tokens, the most wanted first; S (out of range) in empty slots.
      gates: [E, C] float32 weights of the outputs; 0 in empty slots.
    """

    tokens: jax.Array
    gates: jax.Array


@register
@dataclasses.dataclass(frozen=True)
class SoftAssignment:
    """Each slot takes a weighted mean of all tokens, each token one of all slots (Soft MoE).

    Attributes:
      dispatch: [S, E, P] float32 weight of each token in each slot's input.
      combine: [S, E, P] float32 weight of each slot's output in each token's output.
    """

    dispatch: jax.Array
    combine: jax.Array


Assignment = TokenAssignment | ExpertAssignment | SoftAssignment


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
    def of(cls, values: Shaped[Array, "S ..."], mask: Bool[Array, " S"]) -> "Mean":
        """Mean over the leading axis of `values` [S, ...] where `mask` [S] is True."""
        weights = mask.astype(jnp.float32)
        # A sum of products and not a matrix product, which TPUs would round to bfloat16.
        weighted = values.astype(jnp.float32) * weights.reshape(-1, *[1] * (values.ndim - 1))
        return cls(weighted.sum(axis=0), weights.sum())

    @classmethod
    def of_group(cls, value: Float[Array, ""], mask: Bool[Array, " S"]) -> "Mean":
        """One number per group: groups weigh alike, and a group of padding only not at all."""
        real = mask.any()
        return cls(jnp.where(real, value, 0.0), real.astype(jnp.float32))

    def value(self) -> Float[Array, "..."]:
        """total / count, and 0 where nothing was counted."""
        return self.total / jnp.maximum(self.count, 1.0)


@register
@dataclasses.dataclass(frozen=True)
class Routing:
    """A router's answer for one group.

    Attributes:
      assignment: where tokens go; the dispatch reads it.
      probabilities: [S, E] float32, rows sum to 1: how the router spreads each token over the
        experts before it decides; for study, without gradient.
      losses: name -> Mean, before any coefficient.
      statistics: name -> Mean, without gradient.
    """

    assignment: Assignment
    probabilities: jax.Array
    losses: dict[str, Mean]
    statistics: dict[str, Mean]


Arrays = dict[str, jax.Array]


@dataclasses.dataclass
class Router(Component, abc.ABC):
    """The contract: a configuration object with pure methods.

    A new router is a dataclass that inherits from this one, says how it routes, and overrides what
    differs from the defaults here: no parameters, no losses, causal, one expert per token.

    Numbers that only multiply are arguments of the compiled step, see `RouterFactors`.
    """

    @property
    def choices(self) -> int:
        """K, experts per token; capacity rules and FLOP counts read it."""
        return 1

    def experts_per_token(self, tokens: int, num_experts: int, capacity: int) -> float:
        """Expert evaluations per token that the papers count, in groups of S tokens."""
        return self.choices

    def expert_capacity(self, policy: Capacity, tokens: int, num_experts: int, train: bool) -> int:
        """C, slots of each expert's buffer in groups of S tokens, by the layer's capacity policy.

        Raises:
          UserError: the policy gives none.
        """
        return policy.expert_capacity(tokens, self.choices, num_experts, train)

    @property
    def tokens_choose(self) -> bool:
        """Whether tokens choose experts, so that a group can also be routed one token at a time."""
        return True

    @property
    def reads_token_ids(self) -> bool:
        """Whether it routes by `RouterInputs.token_ids`, which not every caller has."""
        return False

    @property
    def largest_gate(self) -> float:
        """No gate is larger; histograms of gates end here."""
        return 1.0

    @property
    def leak(self) -> str | None:
        """What a token's output tells of later tokens, as a clause; None for a causal router."""
        return None

    @property
    def loss_coefficients(self) -> dict[str, float]:
        """Coefficient of each entry of `Routing.losses`."""
        return {}

    def validate(self, num_experts: int) -> None:
        """Raises UserError where the fields cannot work with E experts."""

    def init(self, key: Key[Array, ""], width: int, num_experts: int) -> Arrays:
        """Trained parameters by name, float32, of any shapes; every device has them whole."""
        return {}

    def init_state(self, num_experts: int) -> Arrays:
        """Arrays that no gradient trains (an expert bias), by other names than the parameters."""
        return {}

    @abc.abstractmethod
    def route(
        self, parameters: Arrays, inputs: RouterInputs, num_experts: int, capacity: int
    ) -> Routing:
        """Routes one group.

        Args:
          parameters: what `init` and `init_state` made, as they are now.
          inputs: the group.
          num_experts: E.
          capacity: C, at most S.
        """

    def next_state(self, state: Arrays, statistics: Arrays) -> Arrays:
        """The state after a training step, from the statistics of the whole global batch."""
        return state


@register
@dataclasses.dataclass(frozen=True)
class RouterFactors:
    """What only multiplies in a router: numbers, or [] float32 arrays in place of them.

    Attributes:
      coefficients: of the entries of `Routing.losses`. A loss with the coefficient 0 is not among them:
        it is not computed at all, which makes another program.
      fields: those of the router that are declared as factors, see `moe_jax.component.field`.
    """

    coefficients: dict[str, Any]
    fields: dict[str, Any]

    @classmethod
    def of(cls, router: Router) -> "RouterFactors":
        """The router's own numbers."""
        return cls(router.loss_coefficients, factors_of(router))
