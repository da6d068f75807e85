"""What a researcher watches about routing in every step.

Axis letters: S tokens in a group, K choices per token, E experts.

Per layer and step this adds E + 7 floats to one all-reduce and about S * E * 4 operations per
group for the entropy and the counts, against S * d * f * 4 of the experts.
A step of configs/quickstart.py took 1.02 times as long with them on one CPU device and 0.99 on eight
(medians of 57 interleaved pairs, quartiles 0.94 to 1.07): not resolved from 1.
Statistics that need more than a step's sums are in `moe_jax.routing.study`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe_jax.errors import UserError
from moe_jax.routing.router import ExpertAssignment, Mean, SoftAssignment, TokenAssignment


def of_token_choice(
    assignment: TokenAssignment,
    wanted: Int[Array, "S K"],
    logits: Float[Array, "S E"],
    probabilities: Float[Array, "S E"],
    mask: Bool[Array, " S"],
) -> dict[str, Mean]:
    """Statistics of one group, as sums and counts.

    Args:
      assignment: the group's assignment.
      wanted: [S, K] int32 experts that the tokens chose, before any was rerouted; E for no choice.
      logits: [S, E] float32.
      probabilities: [S, E] float32.
      mask: False for padding.

    Returns:
      load: [E] mean over tokens of how many of their choices are expert e, before drops (sums to
        K); dropped: fraction of choices without a slot; entropy: of the router's distribution in
        nats; logsumexp_squared: mean squared logsumexp of the logits.
    """
    num_experts = logits.shape[-1]
    made = (wanted < num_experts) & mask[:, None]
    dropped = made & (assignment.position_in_expert >= assignment.capacity)
    statistics = {
        "load": Mean.of(jax.nn.one_hot(wanted, num_experts).sum(axis=1), mask),
        "dropped": Mean(dropped.sum(dtype=jnp.float32), made.sum(dtype=jnp.float32)),
        "entropy": Mean.of(entropy(probabilities), mask),
        "logsumexp_squared": Mean.of(jax.nn.logsumexp(logits, axis=-1) ** 2, mask),
    }
    return jax.lax.stop_gradient(statistics)


def with_own(common: dict[str, Mean], own: dict[str, Mean]) -> dict[str, Mean]:
    """The statistics of all routers and those of this one, without gradient.

    Raises:
      UserError: one of its own has the name of a common one.
    """
    for name in own:
        if name in common:
            raise UserError(
                f"a router's own statistic is named {name!r}, which all routers have already; give "
                "it another name."
            )
    return common | jax.lax.stop_gradient(own)


def of_expert_choice(
    assignment: ExpertAssignment, probabilities: Float[Array, "S E"], mask: Bool[Array, " S"]
) -> dict[str, Mean]:
    """Statistics of one group, as sums and counts.

    Returns:
      load: [E] fraction of the tokens that expert e took; dropped: fraction of tokens that no
        expert took; entropy: of the router's distribution in nats.
    """
    taken = taken_by(assignment, len(mask))
    statistics = {
        "load": Mean.of(taken, mask),
        "dropped": Mean.of(taken.sum(axis=1) == 0, mask),
        "entropy": Mean.of(entropy(probabilities), mask),
    }
    return jax.lax.stop_gradient(statistics)


def of_soft(
    assignment: SoftAssignment, probabilities: Float[Array, "S E"], mask: Bool[Array, " S"]
) -> dict[str, Mean]:
    """Statistics of one group, as sums and counts; nothing is ever dropped.

    Returns:
      load: [E] mean combine weight of expert e's slots (sums to 1); entropy: of that weight over
        experts, per token, in nats; largest_dispatch: mean over slots of the largest weight that a
        token has in the slot (1: the slot copies one token); largest_combine: mean over tokens of
        the largest weight of a slot (Soft MoE, appendix on normalisation).
    """
    real = mask.any()
    largest_dispatch = assignment.dispatch.max(axis=0)
    statistics = {
        "load": Mean.of(probabilities, mask),
        "entropy": Mean.of(entropy(probabilities), mask),
        "largest_dispatch": Mean(
            largest_dispatch.sum() * real, largest_dispatch.size * real.astype(jnp.float32)
        ),
        "largest_combine": Mean.of(assignment.combine.max(axis=(1, 2)), mask),
    }
    return jax.lax.stop_gradient(statistics)


def taken_by(assignment: ExpertAssignment, num_tokens: int) -> Float[Array, "{num_tokens} E"]:
    """[S, E] float32, 1 where the expert took the token."""
    num_experts = len(assignment.tokens)
    expert = jnp.arange(num_experts)[:, None]
    return jnp.zeros((num_tokens, num_experts)).at[assignment.tokens, expert].set(1, mode="drop")


def entropy(probabilities: Float[Array, "*rows E"]) -> Float[Array, "*rows"]:
    """Entropy over the last axis, in nats; 0 log 0 is 0."""
    return -jax.scipy.special.xlogy(probabilities, probabilities).sum(axis=-1)


def load_evenness(load: Float[Array, "*rows E"]) -> dict[str, Float[Array, "*rows"]]:
    """How uneven a load [..., E] is.

    Returns:
      max_over_mean_load: 1 at perfect balance, E / K when K experts get everything (MaxViolation of
        the loss-free balancing paper is this minus 1);
      load_cv: coefficient of variation (population standard deviation over mean).
    """
    mean = jnp.maximum(load.mean(axis=-1), 1e-9)
    return {
        "max_over_mean_load": load.max(axis=-1) / mean,
        "load_cv": load.std(axis=-1) / mean,
    }
