"""BASE layers: tokens and experts are matched so that all experts get equally many (Lewis 2021).

Axis letters: S tokens in a group, E experts, C slots per expert, d width.

Two ways to match: `auction` (Bertsekas 1992), exactly balanced and within a known distance of the
best total score, and `sinkhorn` (S-BASE, Clark et al. 2022), nearly balanced and of fixed cost.
"""

import dataclasses
import enum
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from moe_jax.component import field
from moe_jax.errors import UserError
from moe_jax.routing import priority, scores
from moe_jax.routing.capacity import Capacity
from moe_jax.routing.fixed import left_to_right
from moe_jax.routing.published import PublishedRouter
from moe_jax.routing.router import Arrays, Router, RouterInputs, Routing
from moe_jax.routing.token_choice import take_gates


class Solver(enum.StrEnum):
    """How tokens and experts are matched in training.

    AUCTION: at most ceil(S / E) tokens per expert, always (BASE).
    SINKHORN: each token's largest share in a balanced transport plan (S-BASE).
    """

    AUCTION = "auction"
    SINKHORN = "sinkhorn"


@dataclasses.dataclass
class BASE(Router):
    """Balanced assignment of single experts (BASE layers, Lewis et al. 2021).

    Scores are h_t . w_e, without a softmax. In training tokens are matched so that the sum of their
    scores is about the largest with which no expert gets more than its share; no loss is needed. In
    evaluation every token takes its best expert. The gate is sigmoid(score), in (0, 1); through it
    alone the router learns, and only the chosen expert's weights.

    S counts padding in an expert's share of ceil(S / E), though padding takes none of it. The paper
    matches tokens that were shuffled over all workers, here a group is consecutive; and its expert
    vectors start orthogonal with gain 0.1, here normal.

    Attributes:
      solver: how tokens and experts are matched in training.
      auction_epsilon: what a bid is raised by, as a fraction of the largest difference between two
        scores of one token. The mean score per token is within that of the best mean. (Normal
        scores were within 0.04 of it, in 9 to 554 rounds for S = 256 to 4096, E = 8 or 64.)
      auction_rounds: after so many, the tokens that are left take the best expert with room.
      sinkhorn_iterations: how often columns and rows are scaled. (For normal scores that differ by
        10 or so 20 are enough; the busiest expert then has 1.1 to 1.25 times its share.)
      init_deviation: of the weights at the start.
    """

    solver: Solver = Solver.AUCTION
    auction_epsilon: float = 0.02
    auction_rounds: int = field(1000, at_least=1)
    sinkhorn_iterations: int = field(20, at_least=1)
    init_deviation: float = scores.INIT_DEVIATION

    @property
    def leak(self) -> str | None:
        """The matching sees the whole group."""
        return "in training, which expert a token gets depends on the scores of later tokens"

    def validate(self, num_experts: int) -> None:
        """Raises UserError for fields out of range."""
        self.check_ranges("router")
        scores.validate_init_deviation(self.init_deviation)
        # Below 1e-5 a raise is lost in the rounding of float32 prices.
        if not 1e-5 <= self.auction_epsilon <= 1:
            raise UserError(
                f"router.auction_epsilon is {self.auction_epsilon}; it must be in [1e-5, 1]."
            )

    def init(self, key: Key[Array, ""], width: int, num_experts: int) -> Arrays:
        """weights: [d, E] float32."""
        weights = scores.initial_weights(key, width, num_experts, self.init_deviation)
        return {"weights": weights}

    def route(
        self, parameters: Arrays, inputs: RouterInputs, num_experts: int, capacity: int
    ) -> Routing:
        """Routes one group; its probabilities are the softmax of the scores."""
        score = scores.product(inputs.x, parameters["weights"])
        experts = self._experts(jax.lax.stop_gradient(score), inputs)[:, None]
        gates = take_gates(jax.nn.sigmoid(score), experts)
        return left_to_right(experts, gates, score, inputs.mask, capacity)

    def _experts(self, score: jax.Array, inputs: RouterInputs) -> jax.Array:
        """[S] int32 the expert of each token."""
        if not inputs.train:
            return score.argmax(axis=1)
        if self.solver == Solver.SINKHORN:
            return sinkhorn(score, inputs.mask, self.sinkhorn_iterations).argmax(axis=1)
        spread = jnp.where(inputs.mask, jnp.ptp(score, axis=1), 0.0).max()
        # Any raise will do where all experts are equal.
        epsilon = jnp.where(spread > 0, self.auction_epsilon * spread, 1.0)
        per_expert = -(-score.shape[0] // score.shape[1])
        return auction(score, inputs.mask, per_expert, epsilon, self.auction_rounds)


class _Offers(NamedTuple):
    """State of an auction: [S] experts (E for none yet), [S] what was offered for them, rounds."""

    experts: jax.Array
    offers: jax.Array
    rounds: jax.Array


def auction(
    scores: Float[Array, "S E"],
    mask: Bool[Array, " S"],
    per_expert: int,
    epsilon: Float[Array, ""] | float,
    max_rounds: int,
) -> Int[Array, " S"]:
    """Gives each token one expert and no expert more than `per_expert`, at a large total score.

    In a round every token without a place bids for the expert that is worth most to it: score minus
    price. It offers the price at which its second best would be worth as much, and epsilon more.
    An expert keeps the highest offers it has places for, and asks the lowest of them from then on
    (nothing while a place is free). Places of one expert are alike, so bids go to experts and not
    to places (Bertsekas and Castanon 1989).

    When all have a place, each token's expert is worth to it within epsilon of the best, so that
    the total is within (number of tokens) * epsilon of the optimum.

    Args:
      scores: [S, E] float32.
      mask: False for padding, which does not bid.
      per_expert: places of each expert; at least S / E.
      epsilon: [] what a bid is raised by; well above float32's rounding of the scores' differences.
      max_rounds: after so many, tokens without a place take the best expert with a place free.

    Returns:
      [S] int32 experts; E for padding.
    """
    num_tokens, num_experts = scores.shape
    if num_experts * per_expert < num_tokens:
        raise ValueError(f"{num_experts} * {per_expert} places for {num_tokens} tokens")
    # Only differences within a token count. A diverged model's infinities must end the loops, too.
    scores = jnp.nan_to_num(scores)
    scores = jnp.nan_to_num(scores - scores.max(axis=1, keepdims=True))

    def waiting(experts: jax.Array) -> jax.Array:
        return mask & (experts == num_experts)

    def taken(experts: jax.Array) -> jax.Array:
        return jax.nn.one_hot(experts, num_experts, dtype=jnp.int32).sum(axis=0)

    def find_place(wanted: jax.Array, **kwargs: jax.Array) -> jax.Array:
        slots = priority.position_in_expert(
            wanted[:, None], mask, num_experts, per_expert, **kwargs
        )
        return slots[:, 0] < per_expert

    def bidding(state: _Offers) -> jax.Array:
        return waiting(state.experts).any() & (state.rounds < max_rounds)

    def bid(state: _Offers) -> _Offers:
        held = jax.nn.one_hot(state.experts, num_experts, dtype=bool)
        lowest = jnp.where(held, state.offers[:, None], jnp.inf).min(axis=0)
        price = jnp.where(taken(state.experts) == per_expert, lowest, 0.0)
        worth = scores - price
        wanted = worth.argmax(axis=1)
        is_wanted = jax.nn.one_hot(wanted, num_experts, dtype=bool)
        second = jnp.where(is_wanted, -jnp.inf, worth).max(axis=1)
        raised = jnp.where(is_wanted, scores, 0.0).sum(axis=1) - second + epsilon
        new = waiting(state.experts)
        wanted = jnp.where(new, wanted, state.experts)
        offers = jnp.where(new, raised, state.offers)
        highest_first = jnp.argsort(-offers, stable=True)
        experts = jnp.where(find_place(wanted, priority_order=highest_first), wanted, num_experts)
        return _Offers(experts, offers, state.rounds + 1)

    def take_what_is_left(experts: jax.Array) -> jax.Array:
        room = taken(experts) < per_expert
        wanted = jnp.where(room, scores, -jnp.inf).argmax(axis=1)
        wanted = jnp.where(waiting(experts), wanted, num_experts)
        return jnp.where(find_place(wanted, taken=taken(experts)), wanted, experts)

    # Made from the scores, so that inside a shard_map they vary over its devices as they do.
    nowhere = jnp.full_like(scores[:, 0], num_experts, jnp.int32)
    start = _Offers(nowhere, jnp.zeros_like(scores[:, 0]), jnp.int32(0))
    experts = jax.lax.while_loop(bidding, bid, start).experts
    # Each pass fills an expert or is the last: at most E.
    return jax.lax.while_loop(lambda experts: waiting(experts).any(), take_what_is_left, experts)


def sinkhorn(
    scores: Float[Array, "S E"], mask: Bool[Array, " S"], iterations: int
) -> Float[Array, "S E"]:
    """The transport plan of tokens to experts in which all experts get the same mass (Clark 2022).

    It maximises sum_se plan_se score_se plus the plan's entropy; exp(scores) with rows and columns
    scaled in turn, in logarithms.

    Args:
      scores: [S, E] float32.
      mask: False for padding, which has no mass.
      iterations: of one scaling of columns and one of rows each.

    Returns:
      [S, E] float32. Rows sum to 1; columns to (number of tokens) / E as far as the iterations
      have converged; rows of padding are 0.
    """
    real = mask.sum(dtype=jnp.float32)
    share = jnp.log(jnp.maximum(real, 1.0) / scores.shape[1])

    def scale(_: int, column: jax.Array) -> jax.Array:
        log_plan = jax.nn.log_softmax(scores + column, axis=1)
        total = jax.nn.logsumexp(log_plan, axis=0, where=mask[:, None])
        return column + jnp.where(real > 0, share - total, 0.0)

    column = jax.lax.fori_loop(0, iterations, scale, jnp.zeros_like(scores[0]))
    return jnp.where(mask[:, None], jax.nn.softmax(scores + column, axis=1), 0.0)


PUBLISHED: tuple[PublishedRouter, ...] = (
    PublishedRouter(
        "BASE",
        "Lewis et al. 2021",
        "training: the balanced assignment of largest total score x W; evaluation: largest score; "
        "g = sigmoid(score)",
        (0, 1),
        "by construction in training: every expert gets at most S / E tokens, rounded up",
        BASE(),
        Capacity(1.0, 8.0),
    ),
    PublishedRouter(
        "S-BASE",
        "Clark et al. 2022",
        "as BASE; training: largest entry of the Sinkhorn plan of the scores",
        (0, 1),
        "nearly, by the Sinkhorn plan",
        BASE(solver=Solver.SINKHORN),
        Capacity(2.0, 8.0),
    ),
)
"""What papers do with the routers of this file."""
