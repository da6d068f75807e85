"""Routers that learn nothing: the expert is a function of the token's id, a draw, or given.

Axis letters: S tokens in a group, K choices per token, E experts, C slots per expert, V ids in the
vocabulary.

They have no parameters and no losses, look at no later token, and serve tokens left to right. What
they are compared for: how much of a Mixture-of-Experts' gain is the learned routing's.
"""

import dataclasses
import enum
import functools
import heapq
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from moe_jax.errors import UserError
from moe_jax.routing import priority, statistics
from moe_jax.routing.capacity import Capacity
from moe_jax.routing.published import NO_DROPS, PublishedRouter
from moe_jax.routing.router import Arrays, Router, RouterInputs, Routing, TokenAssignment
from moe_jax.routing.token_choice import validate_k


def left_to_right(
    experts: Int[Array, "S K"],
    gates: Float[Array, "S K"],
    logits: Float[Array, "S E"],
    mask: Bool[Array, " S"],
    capacity: int,
) -> Routing:
    """The routing without losses in which tokens are served in their order.

    Args:
      experts: [S, K] int32; E for no choice.
      gates: [S, K] float32.
      logits: [S, E] float32; their softmax is `Routing.probabilities`. Routers that learn nothing
        give log-probabilities, of which the logsumexp is 0.
      mask: False for padding.
      capacity: C.
    """
    slots = priority.position_in_expert(experts, mask, logits.shape[1], capacity)
    assignment = TokenAssignment(experts, slots, gates, capacity)
    probabilities = jax.lax.stop_gradient(jax.nn.softmax(logits))
    return Routing(
        assignment,
        probabilities,
        losses={},
        statistics=statistics.of_token_choice(assignment, experts, logits, probabilities, mask),
    )


def _validate_seed(seed: int) -> None:
    if not 0 <= seed < 2**32:
        raise UserError(f"router.seed is {seed}; it must be between 0 and 2**32 - 1.")


class HashKind(enum.StrEnum):
    """Which expert an id has (Hash Layers, Roller et al. 2021).

    RANDOM: drawn uniformly per id, once. Nothing balances it: frequent ids make busy experts.
    BALANCED: ids in descending order of their counts, each to the expert with the fewest tokens so
      far: balanced over a text with those counts, as far as single ids allow.
    MODULO: id mod E (Expert Choice's comparison). Balanced as far as ids of equal remainder are
      equally frequent together.
    """

    RANDOM = "random"
    BALANCED = "balanced"
    MODULO = "modulo"


@dataclasses.dataclass
class HashRouter(Router):
    """A token's expert is a fixed function of its id (Roller et al. 2021); gates are 1.

    The entropy of its routing is 0: a token has no other expert.

    Attributes:
      vocab_size: V; ids from V on are taken mod V.
      kind: which function.
      seed: of the random table.
      token_counts: of the balanced table, how often each of the V ids occurs; () for equally often.
    """

    vocab_size: int
    kind: HashKind = HashKind.RANDOM
    seed: int = 0
    token_counts: tuple[int, ...] = ()

    @property
    def reads_token_ids(self) -> bool:
        """Yes: nothing else decides."""
        return True

    def validate(self, num_experts: int) -> None:
        """Raises UserError for fields out of range, or counts that no one reads."""
        if self.vocab_size < 1:
            raise UserError(
                f"router.vocab_size is {self.vocab_size}; set it to the tokenizer's vocabulary."
            )
        _validate_seed(self.seed)
        if self.token_counts and self.kind != HashKind.BALANCED:
            raise UserError(
                f"router.token_counts is not read with router.kind={self.kind}; "
                "leave it empty or set kind=balanced."
            )
        if len(self.token_counts) not in (0, self.vocab_size):
            raise UserError(
                f"router.token_counts has {len(self.token_counts)} entries; give one for each of "
                f"the {self.vocab_size} ids of router.vocab_size."
            )
        if any(count < 0 for count in self.token_counts):
            raise UserError(
                f"router.token_counts contains {min(self.token_counts)}; counts are at least 0."
            )

    def route(
        self, parameters: Arrays, inputs: RouterInputs, num_experts: int, capacity: int
    ) -> Routing:
        """Looks each id up; the table [V] is a constant of the compiled program."""
        table = expert_of_id(
            self.kind, self.vocab_size, num_experts, self.seed, tuple(self.token_counts)
        )
        experts = jnp.asarray(table)[inputs.token_ids % self.vocab_size]
        logits = jnp.log(jax.nn.one_hot(experts, num_experts))
        gates = jnp.ones((len(experts), 1))
        return left_to_right(experts[:, None], gates, logits, inputs.mask, capacity)


@functools.lru_cache(maxsize=64)  # One entry per MoE layer's router; layers mostly share one.
def expert_of_id(
    kind: HashKind, vocab_size: int, num_experts: int, seed: int, token_counts: tuple[int, ...]
) -> Int[np.ndarray, " {vocab_size}"]:
    """[V] int32, the expert of each id; arguments as the fields of `HashRouter`."""
    match kind:
        case HashKind.RANDOM:
            # RandomState's stream never changes between NumPy versions: a trained model needs the
            # table that it was trained with.
            table = np.random.RandomState(seed).randint(num_experts, size=vocab_size)
        case HashKind.BALANCED:
            table = _balanced_table(token_counts or (1,) * vocab_size, num_experts)
        case HashKind.MODULO:
            table = np.arange(vocab_size) % num_experts
    table = table.astype(np.int32)
    table.flags.writeable = False
    return table


def _balanced_table(token_counts: tuple[int, ...], num_experts: int) -> np.ndarray:
    """[V] experts: the most frequent id first, each to the expert with the fewest tokens so far."""
    table = np.zeros(len(token_counts), np.int32)
    # Equal loads go by the number of ids, so that ids of count 0 do not all meet in one expert.
    loads = [(0, 0, expert) for expert in range(num_experts)]
    for token in np.argsort(-np.asarray(token_counts), kind="stable"):
        tokens, ids, expert = loads[0]
        heapq.heapreplace(loads, (tokens + token_counts[token], ids + 1, expert))
        table[token] = expert
    return table


class DrawnPer(enum.StrEnum):
    """What shares one draw of experts in training.

    TOKEN: nothing, each token has its own.
    SEQUENCE: the tokens of a sequence.
    BATCH: all tokens of the batch (one expert computes everything in the step).
    """

    TOKEN = "token"
    SEQUENCE = "sequence"
    BATCH = "batch"


@dataclasses.dataclass
class UniformRandom(Router):
    """Experts are drawn uniformly, K different ones at gates of 1/K (THOR, Zuo et al. 2021).

    Balanced in expectation where many draws meet in a step (TOKEN); SEQUENCE and BATCH are balanced
    over steps only. Their buffers have S slots, whatever the capacity policy says, because all tokens
    of a group may go to the same K experts.

    Evaluation has to repeat itself whatever the batch and however the tokens come (one at a time
    from a cache): a token's draw is then a function of `seed` and its position, and with SEQUENCE or
    BATCH of `seed` alone; the layers of a model draw alike. (THOR draws for each sentence and layer.)

    Attributes:
      per: what shares a draw.
      k: K, experts per token (THOR: 1).
      seed: of the draws in evaluation.
    """

    per: DrawnPer = DrawnPer.TOKEN
    k: int = 1
    seed: int = 0

    @property
    def choices(self) -> int:
        """K."""
        return self.k

    def expert_capacity(self, policy: Capacity, tokens: int, num_experts: int, train: bool) -> int:
        """S where tokens share a draw, or else their one expert would drop most of them."""
        if self.per == DrawnPer.TOKEN:
            return policy.expert_capacity(tokens, self.choices, num_experts, train)
        return tokens

    def validate(self, num_experts: int) -> None:
        """Raises UserError unless 1 <= K <= E and the seed is one."""
        validate_k(self.k, num_experts)
        _validate_seed(self.seed)

    def route(
        self, parameters: Arrays, inputs: RouterInputs, num_experts: int, capacity: int
    ) -> Routing:
        """Draws experts; the vectors are not looked at."""
        noise = jax.vmap(lambda key: jax.random.uniform(key, (num_experts,)))(self._keys(inputs))
        # The K largest of E independent numbers are K draws without replacement.
        _, experts = jax.lax.top_k(noise, self.k)
        gates = jnp.full(experts.shape, 1 / self.k)
        logits = jnp.full(noise.shape, -math.log(num_experts))
        return left_to_right(experts, gates, logits, inputs.mask, capacity)

    def _keys(self, inputs: RouterInputs) -> jax.Array:
        """[S] PRNG keys, equal where tokens share a draw."""
        places = jnp.arange(len(inputs.mask))
        nowhere = jnp.zeros_like(places)
        match self.per, inputs.train:
            case DrawnPer.TOKEN, True:
                key, shared_by = inputs.key, places
            case DrawnPer.SEQUENCE, True:
                key, shared_by = inputs.shared_key, inputs.sequence_ids
            case DrawnPer.BATCH, True:
                key, shared_by = inputs.shared_key, nowhere
            case DrawnPer.TOKEN, False:
                key, shared_by = jax.random.key(self.seed), inputs.positions
            case _:
                key, shared_by = jax.random.key(self.seed), nowhere
        return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, shared_by)


@dataclasses.dataclass
class StaticGate(Router):
    """All tokens go to the same experts at the same gates: an average of networks, or one alone.

    With one weight of 1 it is a dense layer. Nothing balances it: K experts get all tokens, so
    their buffers have S slots, whatever the capacity policy says.

    Attributes:
      weights: the gate of each of the E experts; those of 0 are skipped, and K is how many others
        there are. They need not sum to 1.
    """

    weights: tuple[float, ...]

    @property
    def choices(self) -> int:
        """K, the number of weights that are not 0."""
        return sum(weight != 0 for weight in self.weights)

    @property
    def largest_gate(self) -> float:
        """The largest of the weights, or 1 where all are negative."""
        return max(self.weights) if max(self.weights) > 0 else 1.0

    def expert_capacity(self, policy: Capacity, tokens: int, num_experts: int, train: bool) -> int:
        """S, because every used expert gets all tokens."""
        return tokens

    def validate(self, num_experts: int) -> None:
        """Raises UserError unless there are E finite weights, not all of them 0."""
        if len(self.weights) != num_experts:
            raise UserError(
                f"router.weights has {len(self.weights)} entries but there are {num_experts} "
                "experts; give one for each."
            )
        if not all(math.isfinite(weight) for weight in self.weights):
            raise UserError(f"router.weights is {self.weights}; all must be finite numbers.")
        if not self.choices:
            raise UserError("router.weights are all 0, so no expert is used; make one of them 1.")

    def route(
        self, parameters: Arrays, inputs: RouterInputs, num_experts: int, capacity: int
    ) -> Routing:
        """Gives every token the same choices, the largest weight first."""
        weights = np.asarray(self.weights, np.float32)
        experts = np.argsort(-weights, kind="stable")
        experts = experts[weights[experts] != 0].astype(np.int32)
        shares = np.abs(weights) / np.abs(weights).sum()

        def for_each_token(row: np.ndarray) -> jax.Array:
            return jnp.tile(row, (len(inputs.mask), 1))

        return left_to_right(
            for_each_token(experts),
            for_each_token(weights[experts]),
            jnp.log(for_each_token(shares)),
            inputs.mask,
            capacity,
        )


PUBLISHED: tuple[PublishedRouter, ...] = (
    PublishedRouter(
        "Hash, random",
        "Roller et al. 2021",
        "expert of a token id from a random table; g = 1",
        (1, 1),
        "",
        HashRouter(vocab_size=264),
        NO_DROPS,
    ),
    PublishedRouter(
        "Hash, balanced",
        "Roller et al. 2021",
        "frequent ids first, each to the expert with the least tokens so far; g = 1",
        (1, 1),
        "by the ids' frequencies (`token_counts`)",
        HashRouter(vocab_size=264, kind=HashKind.BALANCED),
        NO_DROPS,
    ),
    PublishedRouter(
        "Hash, modulo",
        "Zhou et al. 2022, section 4.5",
        "token id modulo E; g = 1",
        (1, 1),
        "",
        HashRouter(vocab_size=264, kind=HashKind.MODULO),
        NO_DROPS,
    ),
    PublishedRouter(
        "Uniform random, per token",
        "a baseline",
        "an expert drawn uniformly for each token; g = 1",
        (1, 1),
        "by construction, on average",
        UniformRandom(),
        NO_DROPS,
    ),
    PublishedRouter(
        "THOR",
        "Zuo et al. 2021",
        "an expert drawn uniformly for each batch; g = 1; with the task's consistency_weight",
        (1, 1),
        "",
        UniformRandom(per=DrawnPer.BATCH),
        None,
    ),
    PublishedRouter(
        "Static gate",
        "a baseline",
        "every token goes to the same experts with given weights",
        (1, 1),
        "",
        StaticGate(weights=(0.5, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)),
        None,
    ),
)
"""What papers do with the routers of this file."""
