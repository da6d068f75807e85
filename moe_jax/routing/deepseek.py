"""Routers of DeepSeek-V2 and DeepSeek-V3, which limit over how many devices a token is spread.

Axis letters: S tokens in a group, K choices per token, E experts, D groups of consecutive experts
(devices or nodes), M groups that a token may be sent to, d width.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from moe_jax.component import field
from moe_jax.errors import UserError
from moe_jax.routing import losses, scores
from moe_jax.routing.losses import Losses
from moe_jax.routing.published import NO_DROPS, PublishedRouter
from moe_jax.routing.router import Arrays, RouterInputs
from moe_jax.routing.token_choice import (
    Choice,
    LinearRouter,
    TokenChoice,
    validate_expert_groups,
)


def within_best_groups(
    ranking: Float[Array, "S E"], groups: int, groups_per_token: int, counted: int
) -> Float[Array, "S E"]:
    """Leaves a token the experts of its M best groups.

    Args:
      ranking: [S, E] float32, what experts are chosen by.
      groups: D; expert e is in group e // (E / D).
      groups_per_token: M.
      counted: how many of a group's largest entries are summed to rank it.

    Returns:
      [S, E] float32, the ranking in the M best groups and -inf outside of them.
    """
    tokens, num_experts = ranking.shape
    by_group = ranking.reshape(tokens, groups, num_experts // groups)
    largest, _ = jax.lax.top_k(by_group, counted)
    _, best = jax.lax.top_k(largest.sum(axis=-1), groups_per_token)
    allowed = jax.nn.one_hot(best, groups, dtype=jnp.bool_).any(axis=1)
    return jnp.where(allowed[..., None], by_group, -jnp.inf).reshape(tokens, num_experts)


def validate_limit(
    router: TokenChoice, num_experts: int, groups: int, groups_per_token: int, field: str
) -> None:
    """Raises UserError unless K experts fit in M groups and nothing is rerouted out of them."""
    reachable = groups_per_token * num_experts // groups
    if router.k > reachable:
        raise UserError(
            f"router.k is {router.k} but {field}={groups_per_token} of {groups} groups have only "
            f"{reachable} of the {num_experts} experts; lower router.k or raise {field}."
        )
    if router.no_token_left_behind and groups_per_token < groups:
        raise UserError(
            "router.no_token_left_behind is True, which sends tokens to experts outside of the "
            f"{field}={groups_per_token} groups that they are limited to; switch it off."
        )


@dataclasses.dataclass
class DeepSeekV2(LinearRouter):
    """Softmax over all experts, top-K within the token's M best devices (V2 section 2.1.2).

    The devices are those of the losses: D is `losses.devices`, M `losses.devices_per_token`. The M
    devices are those with the largest single affinity. Gates are not renormalised: they sum to
    `gate_scale` times the chosen probabilities.

    The paper's losses are on: coefficients 0.003, 0.05 and 0.02, each 1 at perfect balance. Its
    dropping of the least affine tokens per device is `order=assignment_priority`, per expert.

    Attributes:
      gate_scale: multiplies the gates (16).
    """

    k: int = 6
    losses: Losses = dataclasses.field(
        default_factory=lambda: Losses(
            expert_level=0.003,
            device_level=0.05,
            communication=0.02,
            devices=8,
            devices_per_token=3,
        )
    )
    gate_scale: float = field(16.0, above=0, factor=True)

    @property
    def largest_gate(self) -> float:
        """Probabilities times the scale."""
        return self.gate_scale

    def validate(self, num_experts: int) -> None:
        """Raises UserError for fields out of range."""
        super().validate(num_experts)
        if self.losses.devices == 1:
            raise UserError(
                "router.losses.devices is 1, so DeepSeekV2 limits nothing; set it to the number of "
                "devices, and devices_per_token to how many a token may go to."
            )
        validate_limit(
            self,
            num_experts,
            self.losses.devices,
            self.losses.devices_per_token,
            "router.losses.devices_per_token",
        )

    def choose(self, parameters: Arrays, inputs: RouterInputs, num_experts: int) -> Choice:
        """The K most probable experts on each token's M best devices."""
        logits = self.logits(parameters, inputs)
        probabilities = self.softmax(logits)
        ranking = within_best_groups(
            self.ranking(logits, inputs),
            self.losses.devices,
            self.losses.devices_per_token,
            counted=1,
        )
        _, experts = jax.lax.top_k(ranking, self.k)
        weights = self.rounded(self.gate_scale * probabilities)
        clean = self.clean(parameters, inputs, probabilities)
        return Choice(logits, experts, weights, probabilities, clean)


@dataclasses.dataclass
class DeepSeekV3(TokenChoice):
    """Sigmoid scores, chosen under a bias that balances the load (V3 section 2.1.2).

    s = sigmoid(x W). Experts are chosen by s + bias; the gates are gate_scale * s / (sum of the
    chosen s), without the bias, and sum to `gate_scale`; or gate_scale * s. A token is limited to
    the M groups with the largest sums of their two largest s + bias. `groups=1` limits nothing, as
    in the paper on loss-free balancing (Wang et al. 2024).

    After a training step, the bias of an expert with less than the mean load of the global batch
    rises by `bias_rate`, and that of one with more falls by it. It has no gradient.

    The sequence-wise loss (coefficient 1e-4, 1 at perfect balance) counts as in V3 eq. 18: the K
    largest s of all experts, without bias and groups. Other losses count the experts chosen.

    Attributes:
      groups: D groups of consecutive experts (8).
      groups_per_token: M (4).
      renormalize: divide the gates by their sum (V3: True; loss-free balancing: False).
      gate_scale: multiplies the gates (2.5).
      bias_rate: gamma (1e-3; 0 in the last 0.5T of 14.8T tokens).
    """

    k: int = 8
    losses: Losses = dataclasses.field(default_factory=lambda: Losses(sequence_wise=1e-4))
    groups: int = 8
    groups_per_token: int = 4
    renormalize: bool = True
    gate_scale: float = field(2.5, above=0, factor=True)
    bias_rate: float = 1e-3

    @property
    def largest_gate(self) -> float:
        """Probabilities times the scale."""
        return self.gate_scale

    def validate(self, num_experts: int) -> None:
        """Raises UserError for fields out of range."""
        super().validate(num_experts)
        if not self.bias_rate >= 0:
            raise UserError(
                f"router.bias_rate is {self.bias_rate}; it must be above 0, or 0 to keep the bias."
            )
        validate_expert_groups(self.groups, self.groups_per_token, num_experts)
        validate_limit(
            self, num_experts, self.groups, self.groups_per_token, "router.groups_per_token"
        )

    def init(self, key: Key[Array, ""], width: int, num_experts: int) -> Arrays:
        """weights: [d, E] float32."""
        return {"weights": scores.initial_weights(key, width, num_experts)}

    def init_state(self, num_experts: int) -> Arrays:
        """bias: [E] float32 zeros."""
        return {"bias": jnp.zeros(num_experts)}

    def choose(self, parameters: Arrays, inputs: RouterInputs, num_experts: int) -> Choice:
        """The K experts of largest s + bias in each token's M best groups."""
        logits = scores.product(inputs.x, parameters["weights"])
        log_scores = jax.nn.log_sigmoid(logits)
        # s / sum of s, which is not 0 / 0 where every sigmoid underflows.
        probabilities = jax.nn.softmax(log_scores)
        ranking = jax.lax.stop_gradient(jax.nn.sigmoid(logits) + parameters["bias"])
        counted = min(2, num_experts // self.groups)
        limited = within_best_groups(ranking, self.groups, self.groups_per_token, counted)
        _, experts = jax.lax.top_k(limited, self.k)
        weights = self.gate_scale * jax.nn.sigmoid(logits)
        if self.renormalize:
            # In logarithms, because the bias may choose experts whose scores underflow. Experts that
            # were not chosen weigh 1 at most, so that nothing overflows.
            chosen = jnp.take_along_axis(log_scores, experts, axis=1)
            total = jax.nn.logsumexp(chosen, axis=1, keepdims=True)
            weights = self.gate_scale * jnp.exp(jnp.minimum(log_scores - total, 0.0))
        extra = {}
        if self.losses.sequence_wise:
            _, unbiased = jax.lax.top_k(probabilities, self.k)
            extra["sequence_wise"] = losses.sequence_wise(
                probabilities, unbiased, inputs.mask, inputs.sequence_ids
            )
        return Choice(logits, experts, weights, probabilities, losses=extra)

    def next_state(self, state: Arrays, statistics: Arrays) -> Arrays:
        """bias + gamma * sign(mean load - load); the load is [E], of the whole global batch."""
        load = statistics["load"]
        mean = load.mean()
        # Means are rounded, so that a load of exactly the mean can seem to be off by 1e-7 of it.
        error = jnp.where(jnp.abs(mean - load) < 1e-6 * mean, 0.0, mean - load)
        return {"bias": state["bias"] + self.bias_rate * jnp.sign(error)}


PUBLISHED: tuple[PublishedRouter, ...] = (
    PublishedRouter(
        "DeepSeek-V2, device-limited",
        "DeepSeek-AI 2024a, section 2.2",
        "top-K of p within the M devices of largest p; g = 16 p",
        (0, 16),
        "expert-level, device-level and communication losses",
        DeepSeekV2(
            k=2,
            losses=Losses(
                expert_level=0.003,
                device_level=0.05,
                communication=0.02,
                devices=4,
                devices_per_token=2,
            ),
        ),
        NO_DROPS,
    ),
    PublishedRouter(
        "DeepSeek-V3",
        "DeepSeek-AI 2024b, eq. 12-20",
        "s = sigmoid(x W); top-K of s + bias within the best groups; g = 2.5 s / sum of chosen s",
        (2.5, 2.5),
        "expert bias, moved against each batch's load; sequence-wise loss",
        DeepSeekV3(k=2, groups=4, groups_per_token=2),
        NO_DROPS,
    ),
    PublishedRouter(
        "Loss-free balancing",
        "Wang et al. 2024",
        "s = sigmoid(x W); top-K of s + bias; g = s",
        (0, 2),
        "expert bias, moved against each batch's load",
        DeepSeekV3(
            k=2, groups=1, groups_per_token=1, renormalize=False, gate_scale=1.0, losses=Losses()
        ),
        NO_DROPS,
    ),
)
"""What papers do with the routers of this file."""
