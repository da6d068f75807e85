"""What a researcher asks of the routing of one MoE layer, summed over many batches.

Axis letters: G groups, S tokens in a group, K choices per token, E experts, P slots per expert in
Soft MoE, L positions in a sequence, D labels, V vocabulary.

Three steps, so that any number of tokens costs the memory of one batch:
  tally      one batch, on the device: sums and counts that add up
  add        over batches, on the host in 64 bits: exact where 32 bits would stop counting at 2^24
  summarize  sums to the numbers that the papers print
Unlike the routers, `tally` takes all groups of a batch at once: MaxViolation is a maximum over the
whole batch, and a table over the vocabulary per group would not fit.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jaxtyping import Array, Bool, Int, Num

from moe_jax.routing import statistics
from moe_jax.routing.router import (
    Arrays,
    ExpertAssignment,
    Mean,
    Routing,
    SoftAssignment,
    TokenAssignment,
    register,
)

GATE_BINS = 20

Summary = dict[str, float | list]


@register
@dataclasses.dataclass(frozen=True)
class RoutedTokens:
    """What is known of the tokens that were routed.

    Attributes:
      mask: [G, S] bool, False for padding: it enters nothing.
      token_ids: [G, S] int32 vocabulary ids.
      positions: [G, S] int32 positions within their sequences.
      sequence_ids: [G, S] int32, equal for tokens of one sequence, which are consecutive.
      labels: [G, S] int32, of anything that experts may specialise in (the domain of the row).
    """

    mask: jax.Array
    token_ids: jax.Array
    positions: jax.Array
    sequence_ids: jax.Array
    labels: jax.Array


@register
@dataclasses.dataclass(frozen=True)
class Tallies:
    """Sums over tokens that can be added up over batches. Counts are int32, the rest float32.

    "Choices" are a token's experts: those that it chose, before drops (token choice), or those that
    took it (expert choice). With `no_token_left_behind` they are those after the second pass. In
    Soft MoE every token chooses every expert, by its combine weight. Without padding:

    All routers:
      tokens [], batches []; load [E] choices; importance [E] router probability; entropy [] of each
      token's distribution, in nats; violation [] of each batch, max/mean load - 1;
      by_label [D, E] choices by label; by_token [V, E] choices by token id, if asked for.
    Token and expert choice:
      experts_per_token [E + 1] tokens that 0, 1, ..., E experts serve; wanted [L] and dropped [L]
      by position: choices and those without a slot (expert choice: tokens and those that no expert
      took); pairs [] of consecutive tokens of one sequence and group that both have an expert;
      repeat_first [] pairs with the same first choice (expert choice: the expert that gives the
      token its largest gate); where tokens can have several experts, repeat_any [] pairs with an
      expert in common and coactivation [E, E] tokens that chose both.
    Token choice:
      gates [K, 20] by rank of the choice, in equal bins from 0 to the largest gate there can be.
    Soft MoE:
      largest_dispatch [] sum over the slots [] of the largest weight of a token in the slot;
      largest_combine [] sum over tokens of the largest weight of a slot.

    Attributes:
      sums: name -> array; batches add up.
      maxima: name -> array; the largest over batches counts. Soft MoE's two largest weights; else
        empty.
    """

    sums: Mapping[str, jax.Array | np.ndarray]
    maxima: Mapping[str, jax.Array | np.ndarray]


def tally(
    routing: Routing,
    tokens: RoutedTokens,
    *,
    num_labels: int,
    length: int,
    vocab_size: int = 0,
    largest_gate: float = 1.0,
) -> Tallies:
    """Sums of one batch and one MoE layer; under jit.

    Args:
      routing: of all groups, with a leading axis G everywhere.
      tokens: the same tokens.
      num_labels: D; a label outside [0, D) enters no table.
      length: L; a position outside [0, L) enters no count by position.
      vocab_size: V, or 0 for no [V, E] table.
      largest_gate: where the histograms of gates end; `Router.largest_gate`.
    """
    mask, assignment = tokens.mask, routing.assignment
    probabilities = jnp.where(mask[..., None], routing.probabilities, 0)
    match assignment:
        case TokenAssignment():
            choices = _times_chosen(assignment.experts, probabilities.shape[-1]) * mask[..., None]
            sums = _of_token_choice(assignment, choices, tokens, length, largest_gate)
        case ExpertAssignment():
            taken = jax.vmap(lambda one: statistics.taken_by(one, mask.shape[1]))(assignment)
            choices = taken.astype(jnp.int32) * mask[..., None]
            sums = _of_expert_choice(assignment, choices, tokens, length)
        case SoftAssignment():
            choices, sums = probabilities, {}
    load = choices.sum(axis=(0, 1))
    sums |= {
        "tokens": _count(mask),
        "batches": _count(mask.any()),
        "load": load,
        "importance": probabilities.sum(axis=(0, 1)),
        "entropy": statistics.entropy(probabilities).sum(),
        "violation": jnp.where(load.any(), load.max() / jnp.maximum(load.mean(), 1e-9) - 1, 0),
        "by_label": _by(tokens.labels, choices, num_labels),
    }
    if vocab_size:
        sums["by_token"] = _by(tokens.token_ids, choices, vocab_size)
    if isinstance(assignment, SoftAssignment):
        return _of_soft(assignment, mask, sums)
    return Tallies(sums, {})


def add(total: Tallies, tallies: Tallies) -> Tallies:
    """The tallies of two sets of batches as one, in NumPy: int64 and float64."""
    total, tallies = jax.device_get((total, tallies))
    return Tallies(
        {name: _wide(total.sums[name]) + _wide(tallies.sums[name]) for name in total.sums},
        {name: np.maximum(total.maxima[name], tallies.maxima[name]) for name in total.maxima},
    )


def summarize(total: Tallies, largest_gate: float = 1.0) -> Summary:
    """What the sums mean, as floats and nested lists, ready for JSON.

    A ratio of which nothing was counted is 0.

    Returns:
      All routers:
        tokens: how many.
        load: [E] mean over tokens of the choices of e (sums to K, or to 1 for Soft MoE).
        importance: [E] mean router probability (sums to 1).
        load_cv, importance_cv: coefficient of variation, population deviation over mean (0 at
          balance; Shazeer et al. 2017, table 6, whose importance sums the gates instead).
        max_violation_global: max_e / mean_e of the load of all batches - 1; max_violation_batch:
          the mean over batches of the same of one batch, larger the fewer tokens a batch has
          (MaxVio of loss-free balancing; both 0 at balance).
        dead_experts: experts without a choice.
        entropy: mean entropy of the tokens' distributions, in nats; entropy_of_mean: of the mean
          distribution. ln E at most; low and high: the router is sure, and uses all experts.
        by_label: [D, E] share of expert e in the choices of tokens with a label; rows sum to 1.
        label_information, token_information (the latter if asked for): `mutual_information`.
      Token and expert choice:
        dropped: share of choices without a slot (expert choice: of tokens that no expert took);
        dropped_by_position: [L] the same; wanted_by_position: [L] of how many.
        experts_per_token: [E + 1] share of tokens that 0, 1, ..., E experts serve (Expert Choice,
          figure 3).
        repeat_first: share of consecutive tokens with the same first choice (Mixtral, table 5; 1/E
          for uniformly random routing); repeat_any, if K > 1: with an expert in common (the table's
          "first or second choice" for K = 2; 1 - C(E - K, K) / C(E, K): 46% for 2 of 8).
        coactivation: [E, E] if K > 1, share of the tokens of expert i that also chose j (OLMoE,
          figure 21; (K - 1) / (E - 1) off the diagonal for uniformly random routing).
      Token choice:
        gates: [K, 20] share of the gates of each rank per bin (rows sum to 1); largest_gate: where
          the last bin ends, as `tally` was told.
      Soft MoE (its figures 13 and 14):
        largest_dispatch, largest_combine: means over slots and over tokens of the largest weight;
        largest_dispatch_max, largest_combine_max: the largest of all.
    """
    sums = {name: _wide(value) for name, value in jax.device_get(total).sums.items()}
    load, mean_probability = sums["load"], _ratio(sums["importance"], sums["tokens"])
    summary = {
        "tokens": sums["tokens"],
        "load": _ratio(load, sums["tokens"]),
        "importance": mean_probability,
        "load_cv": _ratio(load.std(), load.mean()),
        "importance_cv": _ratio(mean_probability.std(), mean_probability.mean()),
        "max_violation_global": _ratio(load.max() - load.mean(), load.mean()),
        "max_violation_batch": _ratio(sums["violation"], sums["batches"]),
        "dead_experts": (load == 0).sum(),
        "entropy": _ratio(sums["entropy"], sums["tokens"]),
        "entropy_of_mean": _entropy(mean_probability),
        "by_label": _shares(sums["by_label"]),
        "label_information": mutual_information(sums["by_label"]),
    }
    if "by_token" in sums:
        summary["token_information"] = mutual_information(sums["by_token"])
    if "wanted" in sums:
        summary |= {
            "dropped": _ratio(sums["dropped"].sum(), sums["wanted"].sum()),
            "dropped_by_position": _ratio(sums["dropped"], sums["wanted"]),
            "wanted_by_position": sums["wanted"],
            "experts_per_token": _shares(sums["experts_per_token"]),
            "repeat_first": _ratio(sums["repeat_first"], sums["pairs"]),
        }
    if "coactivation" in sums:
        tokens_of = np.diag(sums["coactivation"])[:, None]
        summary["coactivation"] = _ratio(sums["coactivation"], tokens_of)
        summary["repeat_any"] = _ratio(sums["repeat_any"], sums["pairs"])
    if "gates" in sums:
        summary |= {"gates": _shares(sums["gates"]), "largest_gate": largest_gate}
    if "slots" in sums:
        summary["largest_dispatch"] = _ratio(sums["largest_dispatch"], sums["slots"])
        summary["largest_combine"] = _ratio(sums["largest_combine"], sums["tokens"])
        summary |= {f"{name}_max": value for name, value in total.maxima.items()}
    return {name: np.asarray(value, np.float64).tolist() for name, value in summary.items()}


def mutual_information(table: Num[np.ndarray, "D E"]) -> float:
    """I(row; column) in nats of a table of counts or weights; 0 where they are independent.

    sum_re p_re ln(p_re / (p_r p_e)) with the frequencies put in for the probabilities. With K
    choices per token it is that of a label and one of the K, drawn uniformly. The plug-in estimate
    is biased upwards for few tokens, by about (rows - 1)(columns - 1) / (2 N) for N choices: compare
    tables of equal N, and do not read much into token ids that occurred once.

    Args:
      table: [D, E], such as `Tallies.sums["by_token"]`.
    """
    joint = _ratio(table, table.sum())
    independent = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0)
    seen = joint > 0
    return float(np.sum(joint[seen] * np.log(joint[seen] / independent[seen])))


def saturation(
    experts_before: Int[Array, "T K"],
    experts_after: Int[Array, "T K"],
    mask: Bool[Array, " T"],
    num_experts: int,
) -> Mean:
    """Mean share of a token's K experts that two checkpoints have in common (OLMoE, figure 20).

    1 where the router no longer changes; K / E for uniformly random routing.

    Args:
      experts_before, experts_after: [T, K] int32 choices of the same tokens; E for no choice,
        which has nothing in common with anything.
      mask: False for padding.
      num_experts: E.
    """
    before, after = (_times_chosen(one, num_experts) > 0 for one in (experts_before, experts_after))
    return Mean.of((before & after).sum(axis=-1) / experts_after.shape[-1], mask)


def _of_token_choice(
    assignment: TokenAssignment,
    choices: jax.Array,
    tokens: RoutedTokens,
    length: int,
    largest_gate: float,
) -> Arrays:
    experts, num_experts = assignment.experts, choices.shape[-1]
    made = (experts < num_experts) & tokens.mask[..., None]
    served = made & (assignment.position_in_expert < assignment.capacity)
    sums = _by_position(made.sum(axis=-1), (made & ~served).sum(axis=-1), tokens, length)
    sums |= _of_pairs(choices, experts[..., 0], tokens)
    sums["experts_per_token"] = _histogram(served.sum(axis=-1), num_experts + 1, tokens.mask)
    shares = assignment.gates / largest_gate
    bins = jnp.clip((shares * GATE_BINS).astype(jnp.int32), 0, GATE_BINS - 1)
    sums["gates"] = _histogram(bins, GATE_BINS, made)
    if experts.shape[-1] > 1:
        sums |= _of_sets(choices, tokens)
    return sums


def _of_expert_choice(
    assignment: ExpertAssignment, choices: jax.Array, tokens: RoutedTokens, length: int
) -> Arrays:
    num_experts = choices.shape[-1]
    expert = jnp.arange(num_experts)[:, None]
    # Gates are 0 at least, so that -1 marks the experts that did not take the token.
    none = jnp.full(choices.shape, -1.0)
    gates = jax.vmap(lambda table, one: table.at[one.tokens, expert].set(one.gates, mode="drop"))(
        none, assignment
    )
    served = choices.sum(axis=-1)
    first = jnp.where(served > 0, gates.argmax(axis=-1), num_experts)
    left_out = (served == 0) & tokens.mask
    return (
        _by_position(tokens.mask, left_out, tokens, length)
        | _of_pairs(choices, first, tokens)
        | _of_sets(choices, tokens)
        | {"experts_per_token": _histogram(served, num_experts + 1, tokens.mask)}
    )


def _of_soft(assignment: SoftAssignment, mask: jax.Array, sums: Arrays) -> Tallies:
    real = mask[:, :, None, None]
    # [G, E, P], and 0 in groups of padding, whose slots do not count.
    dispatch = jnp.where(real, assignment.dispatch, 0).max(axis=1)
    combine = jnp.where(real, assignment.combine, 0).max(axis=(2, 3))
    sums |= {
        "slots": _count(mask.any(axis=1)) * dispatch[0].size,
        "largest_dispatch": dispatch.sum(),
        "largest_combine": combine.sum(),
    }
    return Tallies(sums, {"largest_dispatch": dispatch.max(), "largest_combine": combine.max()})


def _times_chosen(experts: jax.Array, num_experts: int) -> jax.Array:
    """[..., E] int32, how often each expert is among the choices [..., K]."""
    return jax.nn.one_hot(experts, num_experts, dtype=jnp.int32).sum(axis=-2)


def _by_position(
    wanted: jax.Array, dropped: jax.Array, tokens: RoutedTokens, length: int
) -> dict[str, jax.Array]:
    counts = jnp.stack([wanted, dropped], axis=-1).astype(jnp.int32)
    table = _by(tokens.positions, counts, length)
    return {"wanted": table[:, 0], "dropped": table[:, 1]}


def _of_pairs(choices: jax.Array, first: jax.Array, tokens: RoutedTokens) -> Arrays:
    pairs = _pairs(choices, tokens)
    return {
        "pairs": _count(pairs),
        "repeat_first": _count(pairs & (first[:, 1:] == first[:, :-1])),
    }


def _of_sets(choices: jax.Array, tokens: RoutedTokens) -> Arrays:
    chosen = choices > 0
    common = (chosen[:, 1:] & chosen[:, :-1]).any(axis=-1)
    # Products of 0 and 1 are exact in any precision, and their float32 sums up to 2^24 tokens.
    ones = chosen.astype(jnp.float32)
    together = jnp.einsum("gsi,gsj->ij", ones, ones, preferred_element_type=jnp.float32)
    return {
        "repeat_any": _count(_pairs(choices, tokens) & common),
        "coactivation": together.astype(jnp.int32),
    }


def _pairs(choices: jax.Array, tokens: RoutedTokens) -> jax.Array:
    """[G, S - 1] bool: a token and the next are of one sequence and both have an expert."""
    routed = choices.any(axis=-1)  # Padding has no choices.
    same_sequence = tokens.sequence_ids[:, 1:] == tokens.sequence_ids[:, :-1]
    return same_sequence & routed[:, 1:] & routed[:, :-1]


def _by(keys: jax.Array, values: jax.Array, num_keys: int) -> jax.Array:
    """Sums of values [G, S, X] by keys [G, S]: [num_keys, X]."""
    return jax.ops.segment_sum(values.reshape(-1, values.shape[-1]), keys.reshape(-1), num_keys)


def _histogram(values: jax.Array, bins: int, mask: jax.Array) -> jax.Array:
    """[..., bins] int32, how many of values [G, S, ...] are 0, 1, ... where the mask is True."""
    hits = (values[..., None] == jnp.arange(bins)) & mask[..., None]
    return hits.sum(axis=(0, 1), dtype=jnp.int32)


def _count(flags: jax.Array) -> jax.Array:
    return flags.sum(dtype=jnp.int32)


def _wide(value: np.ndarray | jax.Array) -> np.ndarray:
    value = np.asarray(value)
    return value.astype(np.float64 if value.dtype.kind == "f" else np.int64)


def _ratio(total: npt.ArrayLike, count: npt.ArrayLike) -> np.ndarray:
    """total / count, and 0 where the count is 0."""
    total, count = np.asarray(total), np.asarray(count)
    return np.where(count > 0, total / np.where(count > 0, count, 1), 0)


def _shares(counts: np.ndarray) -> np.ndarray:
    """Counts over their sum along the last axis."""
    return _ratio(counts, counts.sum(axis=-1, keepdims=True))


def _entropy(distribution: np.ndarray) -> float:
    positive = distribution[distribution > 0]
    return float(-np.sum(positive * np.log(positive)))
