import collections
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.routing import statistics
from moe_jax.routing.router import (
    ExpertAssignment,
    Routing,
    SoftAssignment,
    TokenAssignment,
)
from moe_jax.routing.study import (
    RoutedTokens,
    add,
    mutual_information,
    saturation,
    summarize,
    tally,
)
from moe_jax.routing.token_choice import TopK
from tests.routing import inputs

# Groups, tokens per group, choices, experts, slots, labels, length, vocabulary of the random cases.
G, S, K, E, C, D, L, V = 2, 6, 2, 4, 2, 3, 4, 5

tally_by_label = jax.jit(functools.partial(tally, num_labels=D, length=L, vocab_size=V))
tally_plainly = jax.jit(functools.partial(tally, num_labels=1, length=8))


def routing_of(assignment, probabilities):
    return Routing(assignment, jnp.asarray(probabilities, jnp.float32), {}, {})


def info(mask, token_ids=0, positions=0, sequence_ids=0, labels=0):
    mask = np.asarray(mask)
    arrays = (token_ids, positions, sequence_ids, labels)
    wide = [jnp.asarray(np.broadcast_to(array, mask.shape), jnp.int32) for array in arrays]
    return RoutedTokens(jnp.asarray(mask), *wide)


def summary(routing, tokens):
    return summarize(tally_by_label(routing, tokens))


# By hand: one group of three tokens and padding, three experts, two slots each. Everything that the
# padding says is nonsense that would show.
HAND_INFO = info(
    [[True, True, True, False]],
    token_ids=[[0, 0, 1, 4]],
    positions=[[0, 1, 2, 3]],
    sequence_ids=[[7, 7, 7, 7]],
    labels=[[0, 1, 0, 2]],
)
HAND_PROBABILITIES = [[[0.5, 0.5, 0], [0.5, 0.25, 0.25], [0, 1, 0], [0, 0, 1]]]


@pytest.fixture(scope="module")
def token_choice_by_hand():
    assignment = TokenAssignment(
        experts=jnp.array([[[0, 1], [0, 2], [1, 0], [2, 1]]]),
        position_in_expert=jnp.array(
            [[[0, 0], [1, 0], [1, 2], [0, 0]]]
        ),  # Token 2 lost its second choice.
        gates=jnp.array([[[0.51, 0.52], [0.53, 0.27], [2.5, 0.04], [0.1, 0.1]]]),
        capacity=2,
    )
    return summary(routing_of(assignment, HAND_PROBABILITIES), HAND_INFO)


def test_load_and_balance_by_hand(token_choice_by_hand):
    # Expert 0 was chosen by all three tokens, 1 by tokens 0 and 2, 2 by token 1.
    np.testing.assert_allclose(token_choice_by_hand["load"], [1, 2 / 3, 1 / 3])
    # Counts 3, 2, 1: mean 2, variance 2/3.
    assert token_choice_by_hand["load_cv"] == pytest.approx(math.sqrt(2 / 3) / 2)
    assert token_choice_by_hand["max_violation_global"] == pytest.approx(3 / 2 - 1)
    assert token_choice_by_hand["max_violation_batch"] == pytest.approx(3 / 2 - 1)
    assert token_choice_by_hand["dead_experts"] == 0
    assert token_choice_by_hand["tokens"] == 3


def test_probabilities_by_hand(token_choice_by_hand):
    # Sums 1, 1.75, 0.25: mean 1, deviations 0, 0.75, -0.75, variance 0.375.
    importance = [1 / 3, 1.75 / 3, 0.25 / 3]
    np.testing.assert_allclose(token_choice_by_hand["importance"], importance)
    assert token_choice_by_hand["importance_cv"] == pytest.approx(math.sqrt(0.375))
    # ln 2, 1.5 ln 2 and 0.
    assert token_choice_by_hand["entropy"] == pytest.approx(2.5 * math.log(2) / 3)
    assert token_choice_by_hand["entropy_of_mean"] == pytest.approx(
        -sum(p * math.log(p) for p in importance)
    )


def test_drops_by_hand(token_choice_by_hand):
    assert token_choice_by_hand["dropped"] == pytest.approx(1 / 6)
    assert token_choice_by_hand["dropped_by_position"] == [0, 0, 0.5, 0]
    assert token_choice_by_hand["wanted_by_position"] == [2, 2, 2, 0]
    np.testing.assert_allclose(token_choice_by_hand["experts_per_token"], [0, 1 / 3, 2 / 3, 0])


def test_gates_by_hand(token_choice_by_hand):
    first, second = np.zeros((2, 20))
    first[10], first[19] = 2 / 3, 1 / 3  # 0.51 and 0.53 in [0.5, 0.55); 2.5 is above all bins.
    second[[0, 5, 10]] = 1 / 3
    np.testing.assert_allclose(token_choice_by_hand["gates"], [first, second])


def test_repeats_and_coactivation_by_hand(token_choice_by_hand):
    # First choices 0, 0, 1; tokens 1 and 2 still have expert 0 in common.
    assert token_choice_by_hand["repeat_first"] == 0.5
    assert token_choice_by_hand["repeat_any"] == 1
    # Sets {0, 1}, {0, 2}, {1, 0}: both of expert 1's tokens also chose 0.
    np.testing.assert_allclose(
        token_choice_by_hand["coactivation"], [[1, 2 / 3, 1 / 3], [1, 1, 0], [1, 0, 1]]
    )


def test_labels_by_hand(token_choice_by_hand):
    # Label 0: choices 0, 1, 1, 0; label 1: choices 0, 2; label 2 only has padding.
    assert token_choice_by_hand["by_label"] == [[0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0, 0]]
    # p(0, 1) = 2/6 against 4/6 * 2/6, p(1, 2) = 1/6 against 2/6 * 1/6; the others are independent.
    assert token_choice_by_hand["label_information"] == pytest.approx(
        math.log(1.5) / 3 + math.log(3) / 6
    )
    # Token id 0: choices 0, 1, 0, 2; id 1: choices 1, 0. Expert 0 is independent; the others:
    # 1/6 against 4/6 * 2/6, 1/6 against 4/6 * 1/6, 1/6 against 2/6 * 2/6.
    assert token_choice_by_hand["token_information"] == pytest.approx(
        (math.log(0.75) + 2 * math.log(1.5)) / 6
    )


def test_expert_choice_by_hand():
    # Expert 0 took tokens 0 and 1, expert 1 token 1, expert 2 tokens 1 and 0; nobody took token 2.
    assignment = ExpertAssignment(
        tokens=jnp.array([[[0, 1], [1, 4], [1, 0]]]),
        gates=jnp.array([[[0.5, 0.4], [0.9, 0.0], [0.3, 0.1]]]),
    )
    result = summary(routing_of(assignment, HAND_PROBABILITIES), HAND_INFO)
    np.testing.assert_allclose(result["load"], [2 / 3, 1 / 3, 2 / 3])
    assert result["max_violation_global"] == pytest.approx(2 / (5 / 3) - 1)
    assert result["dropped"] == pytest.approx(1 / 3)
    assert result["dropped_by_position"] == [0, 0, 1, 0]
    assert result["wanted_by_position"] == [1, 1, 1, 0]
    np.testing.assert_allclose(result["experts_per_token"], [1 / 3, 0, 1 / 3, 1 / 3])
    # One pair has experts on both sides: largest gates at experts 0 and 1, sets {0, 2} and all.
    assert (result["repeat_first"], result["repeat_any"]) == (0, 1)
    assert result["coactivation"] == [[1, 0.5, 1], [1, 1, 1], [1, 0.5, 1]]
    np.testing.assert_allclose(result["by_label"], [[0.5, 0, 0.5], [1 / 3] * 3, [0, 0, 0]])
    assert "gates" not in result  # Gates have no rank where tokens do not choose.


def test_soft_by_hand():
    # Two experts of one slot, two tokens and padding; the second group is padding only.
    padding = [[100.0], [100.0]]
    dispatch = [[[[0.75], [0.5]], [[0.25], [0.5]], padding], [padding] * 3]
    combine = [[[[0.9], [0.1]], [[0.4], [0.6]], padding], [padding] * 3]
    assignment = SoftAssignment(jnp.array(dispatch), jnp.array(combine))
    tokens = info([[True, True, False], [False] * 3], labels=[[0, 1, 2], [2, 2, 2]])
    result = summary(routing_of(assignment, np.array(combine)[..., 0]), tokens)
    np.testing.assert_allclose(result["load"], [0.65, 0.35], rtol=1e-6)
    np.testing.assert_allclose(result["importance"], [0.65, 0.35], rtol=1e-6)
    assert result["max_violation_global"] == pytest.approx(0.65 / 0.5 - 1)
    assert result["largest_dispatch"] == pytest.approx((0.75 + 0.5) / 2)
    assert result["largest_dispatch_max"] == pytest.approx(0.75)
    assert result["largest_combine"] == pytest.approx((0.9 + 0.6) / 2)
    assert result["largest_combine_max"] == pytest.approx(0.9)
    np.testing.assert_allclose(result["by_label"], [[0.9, 0.1], [0.4, 0.6], [0, 0]], rtol=1e-6)
    assert not {"dropped", "experts_per_token", "repeat_first", "gates"} & set(result)


def random_info(rng, keep):
    shape = (G, S)
    return info(
        rng.random(shape) < keep,
        token_ids=rng.integers(V, size=shape),
        positions=rng.integers(L, size=shape),
        sequence_ids=np.sort(rng.integers(2, size=shape), axis=1),
        labels=rng.integers(D, size=shape),
    )


def random_probabilities(rng):
    return rng.dirichlet(np.ones(E), size=(G, S))


def random_token_choice(rng, tokens):
    experts = np.argsort(rng.random((G, S, E)), axis=-1)[..., :K]
    experts[..., 1:][rng.random((G, S, K - 1)) < 0.3] = E
    experts[rng.random((G, S)) < 0.1] = E  # No choice at all.
    slots = np.where(experts < E, rng.integers(C + 1, size=experts.shape), C)
    # Away from the borders of the bins, where float32 and Python may differ.
    gates = (rng.integers(25, size=experts.shape) + 0.5) / 20
    arrays = (jnp.asarray(x) for x in (experts, slots, gates.astype(np.float32)))
    return TokenAssignment(*arrays, C)


def random_expert_choice(rng, tokens):
    taken = np.full((G, E, C), S)
    for group, expert in np.ndindex(G, E):
        real = rng.permutation(np.flatnonzero(np.asarray(tokens.mask)[group]))[:C]
        taken[group, expert, : len(real)] = real
    gates = np.where(taken < S, rng.random(taken.shape), 0).astype(np.float32)
    return ExpertAssignment(jnp.asarray(taken), jnp.asarray(gates))


def seen_token_choice(assignment, group, token):
    """(choices, first choice, choices that were served, choices that count as wanted)."""
    experts = np.asarray(assignment.experts)[group, token]
    slots = np.asarray(assignment.position_in_expert)[group, token]
    made = [int(e) for e in experts if e < E]
    served = sum(1 for e, c in zip(experts, slots, strict=True) if e < E and c < C)
    return made, int(experts[0]), served, len(made)


def seen_expert_choice(assignment, group, token):
    gates = {}
    for expert, slot in np.ndindex(E, C):
        if np.asarray(assignment.tokens)[group, expert, slot] == token:
            gates[expert] = float(np.asarray(assignment.gates)[group, expert, slot])
    first = max(gates, key=gates.get) if gates else E
    return list(gates), first, len(gates), 1


def by_loops(assignment, probabilities, tokens, seen):
    """The summary of one batch, from the definitions, token by token."""
    field = {name: np.asarray(array) for name, array in vars(tokens).items()}
    mean_p, entropy, load = np.zeros(E), 0.0, np.zeros(E)
    wanted, lost, served_by = np.zeros(L), np.zeros(L), collections.Counter()
    tables = {"labels": np.zeros((D, E)), "token_ids": np.zeros((V, E))}
    both, pairs, same_first, same_any = np.zeros((E, E)), 0, 0, 0
    real = [(g, s) for g, s in np.ndindex(G, S) if field["mask"][g, s]]
    for g, s in real:
        chosen, first, served, wants = seen(assignment, g, s)
        mean_p += probabilities[g, s] / len(real)
        entropy -= sum(p * math.log(p) for p in probabilities[g, s] if p > 0) / len(real)
        wanted[field["positions"][g, s]] += wants
        lost[field["positions"][g, s]] += wants - min(served, wants)
        served_by[served] += 1
        for e in chosen:
            load[e] += 1
            for name, table in tables.items():
                table[field[name][g, s], e] += 1
            for other in chosen:
                both[e, other] += 1
        if (g, s + 1) in real and field["sequence_ids"][g, s] == field["sequence_ids"][g, s + 1]:
            next_chosen, next_first, _, _ = seen(assignment, g, s + 1)
            if chosen and next_chosen:
                pairs += 1
                same_first += first == next_first
                same_any += bool(set(chosen) & set(next_chosen))
    violation = max(load) / (sum(load) / E) - 1 if sum(load) else 0

    def share(row):
        return [x / sum(row) if sum(row) else 0 for x in row]

    def information(table):
        joint, total = table / max(table.sum(), 1), 0.0
        for row, column in np.ndindex(joint.shape):
            if joint[row, column]:
                apart = joint[row].sum() * joint[:, column].sum()
                total += joint[row, column] * math.log(joint[row, column] / apart)
        return total

    return {
        "tokens": len(real),
        "load": load / max(len(real), 1),
        "importance": mean_p,
        "load_cv": np.std(load) / np.mean(load) if sum(load) else 0,
        "importance_cv": np.std(mean_p) / np.mean(mean_p) if real else 0,
        "max_violation_global": violation,
        "max_violation_batch": violation,
        "dead_experts": sum(1 for x in load if x == 0),
        "entropy": entropy,
        "entropy_of_mean": -sum(p * math.log(p) for p in mean_p if p > 0),
        "by_label": [share(row) for row in tables["labels"]],
        "label_information": information(tables["labels"]),
        "token_information": information(tables["token_ids"]),
        "dropped": sum(lost) / max(sum(wanted), 1),
        "dropped_by_position": lost / np.maximum(wanted, 1),
        "wanted_by_position": wanted,
        "experts_per_token": share([served_by[count] for count in range(E + 1)]),
        "repeat_first": same_first / max(pairs, 1),
        "repeat_any": same_any / max(pairs, 1),
        "coactivation": [[both[i, j] / max(both[i, i], 1) for j in range(E)] for i in range(E)],
    }


def gates_by_loops(assignment, tokens):
    counts = np.zeros((K, 20))
    for g, s, k in np.ndindex(G, S, K):
        if tokens.mask[g, s] and assignment.experts[g, s, k] < E:
            counts[k, min(math.floor(float(assignment.gates[g, s, k]) / 0.05), 19)] += 1
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


@pytest.mark.parametrize("family", ["token choice", "expert choice"])
@given(seed=st.integers(0, 2**31), keep=st.sampled_from([0.0, 0.4, 0.8, 1.0]))
@settings(max_examples=20, deadline=None)
def test_summary_equals_the_loops(family, seed, keep):
    rng = np.random.default_rng(seed)
    tokens, probabilities = random_info(rng, keep), random_probabilities(rng)
    if family == "token choice":
        assignment, seen = random_token_choice(rng, tokens), seen_token_choice
    else:
        assignment, seen = random_expert_choice(rng, tokens), seen_expert_choice
    result = summary(routing_of(assignment, probabilities), tokens)
    expected = by_loops(assignment, probabilities, tokens, seen)
    if family == "token choice":
        expected["largest_gate"] = 1.0
        expected["gates"] = gates_by_loops(assignment, tokens)
    assert set(result) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(result[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def random_soft(rng, tokens):
    mask = np.asarray(tokens.mask)[:, :, None, None]
    logits = rng.normal(size=(G, S, E, C))
    dispatch = np.where(mask, np.exp(logits), 0)
    dispatch /= np.maximum(dispatch.sum(axis=1, keepdims=True), 1e-9)
    combine = np.exp(logits) / np.exp(logits).sum(axis=(2, 3), keepdims=True)
    return SoftAssignment(*(jnp.asarray(x, jnp.float32) for x in (dispatch, combine)))


FAMILIES = {
    "token choice": random_token_choice,
    "expert choice": random_expert_choice,
    "soft": random_soft,
}


@pytest.mark.parametrize("seed", range(3))
def test_soft_equals_the_loops(seed):
    rng = np.random.default_rng(seed)
    tokens = random_info(rng, 0.6)
    assignment = random_soft(rng, tokens)
    combine, dispatch = np.asarray(assignment.combine), np.asarray(assignment.dispatch)
    probabilities = combine.sum(axis=-1)
    result = summary(routing_of(assignment, probabilities), tokens)
    real = [(g, s) for g, s in np.ndindex(G, S) if tokens.mask[g, s]]
    load, by_label = np.zeros(E), np.zeros((D, E))
    for g, s in real:
        load += probabilities[g, s] / len(real)
        by_label[tokens.labels[g, s]] += probabilities[g, s]
    largest_combine = [combine[g, s].max() for g, s in real]
    largest_dispatch = [
        max(dispatch[g, s, e, c] for s in range(S) if tokens.mask[g, s])
        for g, e, c in np.ndindex(G, E, C)
        if np.asarray(tokens.mask)[g].any()
    ]
    expected = {
        "load": load,
        "importance": load,
        "largest_combine": np.mean(largest_combine),
        "largest_combine_max": max(largest_combine),
        "largest_dispatch": np.mean(largest_dispatch),
        "largest_dispatch_max": max(largest_dispatch),
        "by_label": by_label / np.maximum(by_label.sum(axis=1, keepdims=True), 1e-9),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(result[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_padding_counts_nothing_and_stays_finite(family):
    rng = np.random.default_rng(0)
    real = random_info(rng, 1.0)
    assignment, probabilities = FAMILIES[family](rng, real), random_probabilities(rng)
    empty = RoutedTokens(**vars(real) | {"mask": jnp.zeros((G, S), bool)})
    counted = tally_by_label(routing_of(assignment, probabilities), empty)
    for name, value in {**counted.sums, **counted.maxima}.items():
        assert not np.any(value), name
    for name, value in summarize(counted).items():
        assert np.isfinite(value).all(), name
    # So a batch of padding changes nothing, also not the mean over batches.
    batch = tally_by_label(routing_of(assignment, probabilities), real)
    assert summarize(add(batch, counted)) == summarize(batch)


@pytest.mark.parametrize("family", FAMILIES)
def test_contents_of_padding_change_nothing(family):
    rng = np.random.default_rng(1)
    tokens = random_info(rng, 0.6)
    assignment, probabilities = FAMILIES[family](rng, tokens), random_probabilities(rng)
    mask = np.asarray(tokens.mask)
    assert not mask.all()

    def spoil(array, value):
        array = np.asarray(array)
        return np.where(mask.reshape(G, S, *[1] * (array.ndim - 2)), array, value)

    spoiled = RoutedTokens(
        tokens.mask,
        *(jnp.asarray(spoil(array, 1)) for name, array in vars(tokens).items() if name != "mask"),
    )
    if family == "token choice":
        arrays = (assignment.experts, assignment.position_in_expert, assignment.gates)
        changed = TokenAssignment(*(jnp.asarray(spoil(x, 0)) for x in arrays), C)
    elif family == "soft":
        changed = SoftAssignment(*(spoil(x, 9.0) for x in vars(assignment).values()))
    else:
        changed = assignment  # It cannot name padding.
    before = summary(routing_of(assignment, probabilities), tokens)
    after = summary(routing_of(changed, spoil(probabilities, np.nan)), spoiled)
    assert before == after


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_add_up_to_the_whole(family):
    rng = np.random.default_rng(2)
    tokens = random_info(rng, 0.8)
    routing = routing_of(FAMILIES[family](rng, tokens), random_probabilities(rng))
    parts = [
        tally_by_label(*jax.tree.map(lambda x, g=g: x[g : g + 1], (routing, tokens)))
        for g in range(G)
    ]
    added, whole = summarize(add(*parts)), summary(routing, tokens)
    per_batch = [summarize(part)["max_violation_batch"] for part in parts]
    assert added.pop("max_violation_batch") == pytest.approx(np.mean(per_batch))
    whole.pop("max_violation_batch")
    assert set(added) == set(whole)
    for name, value in whole.items():
        np.testing.assert_allclose(added[name], value, rtol=1e-5, atol=1e-7, err_msg=name)


def one_choice(experts, num_experts):
    """Routing and tokens of one group [1, S] that chose `experts`, for sure."""
    experts = jnp.asarray(experts)[None, :, None]
    assignment = TokenAssignment(experts, jnp.zeros_like(experts), jnp.ones(experts.shape), 1)
    mask = np.ones((1, experts.shape[1]), bool)
    return routing_of(assignment, jax.nn.one_hot(experts[..., 0], num_experts)), info(mask)


def test_violations_of_batches_do_not_cancel():
    # Each batch goes to one of two experts: max/mean is 2 in both, and 1 over both.
    batches = [tally_plainly(*one_choice([e, e, e], 2)) for e in (0, 1)]
    result = summarize(add(*batches))
    assert result["max_violation_global"] == 0
    assert result["max_violation_batch"] == 1
    assert result["dead_experts"] == 0
    assert summarize(batches[0])["dead_experts"] == 1


def test_one_choice_per_token_has_no_coactivation():
    result = summarize(tally_plainly(*one_choice([0, 1, 1], 2)))
    assert result["repeat_first"] == 0.5
    assert not {"coactivation", "repeat_any", "token_information"} & set(result)


def test_sums_stay_exact_where_32_bits_do_not():
    total = tally_plainly(*one_choice([0, 1, 1], 2))
    for _ in range(40):
        total = add(total, total)
    assert total.sums["load"].tolist() == [2**40, 2**41]
    assert add(total, tally_plainly(*one_choice([0], 2))).sums["load"][0] == (2**40 + 1)
    assert total.sums["importance"].dtype == np.float64


def test_labels_and_positions_out_of_range_enter_no_table():
    routing, tokens = one_choice([0, 1, 1], 2)
    tokens = info(tokens.mask, positions=[[0, 5, -1]], labels=[[-1, 9, 1]])
    counted = tally(routing, tokens, num_labels=2, length=2)
    assert counted.sums["by_label"].tolist() == [[0, 0], [0, 1]]
    assert counted.sums["wanted"].tolist() == [1, 0]
    assert counted.sums["load"].tolist() == [1, 2]


def test_load_and_drops_agree_with_the_training_statistics():
    group = inputs.group(inputs.vectors(8), mask=np.arange(8) < 6, train=False)
    router = TopK(k=2)
    parameters = {"weights": inputs.vectors(8, width=4, seed=1)}
    routing = jax.jit(lambda: router.route(parameters, group, num_experts=4, capacity=2))()
    tokens = info(group.mask[None], positions=group.positions[None])
    batched = jax.tree.map(lambda x: x[None], routing)
    result = summarize(tally_plainly(batched, tokens))
    for name in ("load", "dropped", "entropy"):
        np.testing.assert_allclose(
            result[name], routing.statistics[name].value(), rtol=1e-6, err_msg=name
        )
    load_evenness = statistics.load_evenness(routing.statistics["load"].value())
    assert result["load_cv"] == pytest.approx(float(load_evenness["load_cv"]), rel=1e-5)
    assert result["dropped"] > 0


def test_uniformly_random_routing_gives_the_baselines_of_the_papers():
    # Mixtral table 5: 1/8 = 12.5 % and 1 - 6/8 * 5/7 = 46 % for 2 of 8 experts.
    experts = np.argsort(np.random.default_rng(0).random((4, 4096, 8)), axis=-1)[..., :2]
    slots, gates = jnp.zeros(experts.shape, jnp.int32), jnp.full(experts.shape, 0.5)
    assignment = TokenAssignment(jnp.asarray(experts), slots, gates, 1)
    routing = routing_of(assignment, jnp.full((4, 4096, 8), 1 / 8))
    result = summarize(tally_plainly(routing, info(np.ones((4, 4096), bool))))
    assert result["repeat_first"] == pytest.approx(0.125, abs=0.01)
    assert result["repeat_any"] == pytest.approx(1 - 6 / 8 * 5 / 7, abs=0.015)
    others = np.array(result["coactivation"])[~np.eye(8, dtype=bool)]
    np.testing.assert_allclose(others, 1 / 7, atol=0.03)
    assert result["entropy"] == pytest.approx(math.log(8))


@pytest.mark.parametrize(("choices", "expected"), [(1, 1 / 64), (8, 8 / 64)])  # OLMoE: 1.6, 12.5 %.
def test_saturation_of_random_routing_is_k_over_e(choices, expected):
    order = np.argsort(np.random.default_rng(1).random((2, 8192, 64)), axis=-1)[..., :choices]
    before, after = jnp.asarray(order)
    result = saturation(before, after, jnp.ones(8192, bool), 64).value()
    assert result == pytest.approx(expected, abs=0.005)


def test_saturation_by_hand():
    # Token 0 keeps both experts in the other order, 1 keeps one, 2 made no second choice in either
    # (which is not something in common), 3 is padding.
    before = jnp.array([[0, 1], [0, 1], [2, 3], [0, 1]])
    after = jnp.array([[1, 0], [1, 2], [2, 3], [0, 1]])
    result = saturation(before, after, jnp.array([True, True, True, False]), 3)
    assert (result.total, result.count) == (1 + 0.5 + 0.5, 3)
    empty = saturation(before, after, jnp.zeros(4, bool), 3)
    assert empty.value() == 0


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ([[2, 0], [0, 2]], math.log(2)),
        ([[1, 1], [1, 1]], 0),
        ([[3, 1], [1, 3]], 0.75 * math.log(1.5) + 0.25 * math.log(0.5)),
        ([[0, 0], [0, 0]], 0),
    ],
)
def test_mutual_information_by_hand(table, expected):
    assert mutual_information(np.array(table)) == pytest.approx(expected)
    assert mutual_information(10 * np.array(table)) == pytest.approx(expected)


def test_mutual_information_of_few_independent_tokens_is_biased_upwards():
    # As the docstring says: (rows - 1)(columns - 1) / (2 N).
    rng = np.random.default_rng(0)
    tables = rng.multinomial(200, np.full(12, 1 / 12), size=400).reshape(-1, 3, 4)
    estimate = np.mean([mutual_information(table) for table in tables])
    assert estimate == pytest.approx(2 * 3 / (2 * 200), rel=0.1)


def test_summary_is_json(token_choice_by_hand):
    assert json.loads(json.dumps(token_choice_by_hand)) == token_choice_by_hand
