"""Expert choice: every expert takes its C best tokens (Zhou et al. 2022).

Axis letters: S tokens in a group, E experts, C slots per expert, d width.

No expert is ever over- or underfull, so there is nothing to balance; instead a token is taken by
anything between none and all of the experts, unless `ExpertChoice.cap` bounds it.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from moe_jax.errors import UserError
from moe_jax.routing import losses, scores, statistics
from moe_jax.routing.capacity import Capacity, CapacityRule
from moe_jax.routing.published import PublishedRouter
from moe_jax.routing.router import Arrays, ExpertAssignment, Router, RouterInputs, Routing

ENTROPY_WEIGHT = 1e-3  # lambda of the capped variant's linear program.
ITERATIONS = 100  # Of Dykstra's algorithm, at most, says the paper.
NEVER = -1e6  # Score of padding in the program; finite, so that no difference of two is NaN.


@dataclasses.dataclass
class ExpertChoice(Router):
    """Softmax over experts, then each expert's C most probable tokens (Zhou et al. 2022).

    The gate is the probability p[s, e] of the softmax over experts and is not renormalised: the
    gates of a token sum to at most 1, and to 0 for a token that nobody took. There is no balancing
    loss. C is the business of the capacity rule (`expert_choice`: the factor is the mean number of
    experts per token, 2 in the paper). An expert with more slots than there are real tokens leaves
    the rest empty.

    Attributes:
      cap: experts per token at most, by `capped_plan` (the paper's EC-CAP2 and EC-CAP3); 0 for none.
        The plan is rounded by filling every expert, so where it splits a token between experts,
        the token can exceed the cap.
      router_z_weight: coefficient of `losses.router_z` (not in the paper; ST-MoE: 1e-3).
    """

    cap: int = 0
    router_z_weight: float = 0.0

    def experts_per_token(self, tokens: int, num_experts: int, capacity: int) -> float:
        """On average E C / S."""
        return num_experts * capacity / tokens

    @property
    def tokens_choose(self) -> bool:
        """False: an expert compares the tokens of a group."""
        return False

    @property
    def leak(self) -> str | None:
        """Tokens compete for the experts, later ones too."""
        return "whether an expert takes a token depends on the other tokens of its group"

    @property
    def loss_coefficients(self) -> dict[str, float]:
        """The coefficient of the router z-loss, unless 0."""
        return {"router_z": self.router_z_weight} if self.router_z_weight else {}

    def validate(self, num_experts: int) -> None:
        """Raises UserError for a negative cap or coefficient."""
        if self.cap < 0:
            raise UserError(
                f"router.cap is {self.cap}; use the experts that a token may have at most, or 0 "
                "for no cap."
            )
        if not self.router_z_weight >= 0:
            raise UserError(
                f"router.router_z_weight is {self.router_z_weight}; a coefficient is at least 0."
            )

    def init(self, key: Key[Array, ""], width: int, num_experts: int) -> Arrays:
        """weights: [d, E] float32."""
        return {"weights": scores.initial_weights(key, width, num_experts)}

    def route(
        self, parameters: Arrays, inputs: RouterInputs, num_experts: int, capacity: int
    ) -> Routing:
        """Routes one group in float32."""
        logits = scores.product(inputs.x, parameters["weights"])
        probabilities = jax.nn.softmax(logits)
        ranking = probabilities
        if self.cap:
            ranking = capped_ranking(probabilities, inputs.mask, capacity, self.cap)
        assignment = largest(ranking, probabilities, inputs.mask, capacity)
        return Routing(
            assignment,
            jax.lax.stop_gradient(probabilities),
            losses={name: losses.router_z(logits, inputs.mask) for name in self.loss_coefficients},
            statistics=statistics.of_expert_choice(assignment, probabilities, inputs.mask),
        )


def largest(
    ranking: Float[Array, "S E"],
    probabilities: Float[Array, "S E"],
    mask: Bool[Array, " S"],
    capacity: int,
) -> ExpertAssignment:
    """Each expert's C tokens of largest rank, the first of equals.

    Args:
      ranking: [S, E] float32, carries no gradient; -inf where the expert must not take the token.
      probabilities: [S, E] float32, the gates.
      mask: False for padding, which is never taken.
      capacity: C, at most S.
    """
    ranking = jnp.where(mask[:, None], jax.lax.stop_gradient(ranking), -jnp.inf)
    rank, tokens = jax.lax.top_k(ranking.T, capacity)
    gates = jnp.take_along_axis(probabilities.T, tokens, axis=1)
    taken = rank > -jnp.inf
    return ExpertAssignment(jnp.where(taken, tokens, len(mask)), jnp.where(taken, gates, 0.0))


def capped_ranking(
    probabilities: Float[Array, "S E"], mask: Bool[Array, " S"], capacity: int, cap: int
) -> Float[Array, "S E"]:
    """[S, E] by which experts rank tokens so that few tokens have more than `cap` experts.

    The plan's logarithm, which puts the same tokens first and has no ties where the plan is 1. Where
    the real tokens are too few to fill the experts, only a token's `cap` best experts may take it.
    """
    num_experts = probabilities.shape[1]
    plan = log_capped_plan(jax.lax.stop_gradient(probabilities), mask, capacity, cap)
    _, experts = jax.lax.top_k(plan, min(cap, num_experts))
    best = jax.nn.one_hot(experts, num_experts).any(axis=1)
    return jnp.where(_can_fill(mask, num_experts, capacity, cap) | best, plan, -jnp.inf)


def capped_plan(
    probabilities: Float[Array, "S E"], mask: Bool[Array, " S"], capacity: int, cap: int
) -> Float[Array, "S E"]:
    """The capped variant's plan A: which fractions of which tokens experts take (Zhou et al. 2022).

    A [S, E] maximises sum_se p[s, e] A[s, e] + lambda H(A), lambda = 0.001, where H is the entropy
    -sum A log A, over
      sum_s A[s, e] = C (every expert is full),
      sum_e A[s, e] <= cap (no token has more than `cap` experts),
      0 <= A <= 1.
    That is the Kullback-Leibler projection of exp(p / lambda) onto these sets, by 100 iterations of
    Dykstra's algorithm. Two things differ from its plainest form, and the maximum does not: it
    projects in turn onto the plans with the first and third property and onto those with the second
    and third (onto one property at a time, a log weight moves by log C at most in an iteration, and
    100 are far too few at this lambda), and lambda falls from 0.1 over the first 44 iterations.
    The second property holds exactly, the first nearly.

    With fewer than E * C / cap real tokens (and C no more than their number) the program has no
    solution. Then the scarce side is served in full: every real token has exactly min(cap, E)
    experts, and experts are at most full. An expert never takes more than all real tokens.

    Args:
      probabilities: [S, E] float32 p.
      mask: [S] bool; rows of padding are 0.
      capacity: C.
      cap: experts per token at most.

    Returns:
      [S, E] float32 in [0, 1].
    """
    return jnp.exp(jnp.minimum(log_capped_plan(probabilities, mask, capacity, cap), 0.0))


def log_capped_plan(
    probabilities: Float[Array, "S E"], mask: Bool[Array, " S"], capacity: int, cap: int
) -> Float[Array, "S E"]:
    """log A of `capped_plan`, before its upper bound: above 0 where A is 1; below -1e8 for padding.

    A is min(1, exp((p - token_price + expert_bias) / lambda)), and each projection is the exact
    solution for the prices given the biases, or the other way round.
    """
    num_experts = probabilities.shape[1]
    scored = jnp.where(mask[:, None], probabilities, NEVER)
    per_expert = jnp.clip(mask.sum(), 1, capacity)
    per_token = min(cap, num_experts)
    fill = _can_fill(mask, num_experts, capacity, cap)

    def token_price(expert_bias: jax.Array, entropy: jax.Array | float) -> jax.Array:
        price = -entropy * _shift_to_total((scored + expert_bias) / entropy, per_token)
        price = jnp.where(fill, jnp.maximum(price, 0.0), price)
        return jnp.where(mask, price, 0.0)[:, None]

    def iteration(step: jax.Array | int, expert_bias: jax.Array) -> jax.Array:
        entropy = jnp.maximum(ENTROPY_WEIGHT, 0.1 * 0.9**step)
        net = scored - token_price(expert_bias, entropy)
        bias = entropy * _shift_to_total(net.T / entropy, per_expert)
        return jnp.where(fill, bias, jnp.minimum(bias, 0.0))

    # Any bias is a valid start; this one varies over the devices of a shard_map as the result does.
    bias = jax.lax.fori_loop(0, ITERATIONS, iteration, -probabilities.max(axis=0))
    return (scored + bias - token_price(bias, ENTROPY_WEIGHT)) / ENTROPY_WEIGHT


def _can_fill(mask: jax.Array, num_experts: int, capacity: int, cap: int) -> jax.Array:
    """Whether the real tokens, each at most `cap` times, are enough for all experts."""
    real = mask.sum()
    return real * cap >= num_experts * jnp.minimum(real, capacity)


State = tuple[jax.Array, jax.Array, jax.Array]  # Shift, terms that are 1, whether that grew.


def _shift_to_total(logs: jax.Array, total: jax.Array | int) -> jax.Array:
    """v with sum_i min(1, exp(logs_i + v)) = total over the last axis; 1 <= total <= its length.

    With the terms that are 1 at some v too small, the others can be solved for a larger v, at which
    more terms may be 1. No term stops being 1, so that this ends, after about five rounds. (Sorting
    solves it at once and took 28 times as long for 16 groups of 64 tokens on a CPU.)
    """

    def larger(state: State) -> State:
        shift, ones, _ = state
        full = logs + shift[..., None] >= 0
        count = full.sum(axis=-1)
        rest = jax.nn.logsumexp(jnp.where(full, -jnp.inf, logs), axis=-1)
        solved = jnp.log(jnp.maximum(total - count, 1)) - rest
        # The maximum, so that rounding cannot make a term that was 1 less than that, for ever.
        solved = jnp.where(count < total, jnp.maximum(solved, shift), shift)
        return solved, count, count > ones

    none = jnp.log(jnp.asarray(total, jnp.float32)) - jax.nn.logsumexp(logs, axis=-1)
    start = (none, jnp.zeros_like(none, jnp.int32), none < jnp.inf)
    return jax.lax.while_loop(lambda state: state[2].any(), larger, start)[0]


_EXPERT_CHOICE = Capacity(2.0, 2.0, CapacityRule.EXPERT_CHOICE)

PUBLISHED: tuple[PublishedRouter, ...] = (
    PublishedRouter(
        "Expert Choice",
        "Zhou et al. 2022",
        "each expert takes the C tokens of largest p; g = p",
        (0, 1),
        "by construction: every expert takes C tokens",
        ExpertChoice(),
        _EXPERT_CHOICE,
    ),
    PublishedRouter(
        "Expert Choice, capped",
        "Zhou et al. 2022, section 4.5",
        "each expert takes the C tokens of largest weight in an entropy-regularised linear program; "
        "g = p",
        (0, 1),
        "by construction: every expert takes C tokens",
        ExpertChoice(cap=2),
        _EXPERT_CHOICE,
    ),
)
"""What papers do with the routers of this file."""
