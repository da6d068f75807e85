import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.errors import UserError
from moe_jax.routing.fixed import (
    DrawnPer,
    HashKind,
    HashRouter,
    StaticGate,
    UniformRandom,
    expert_of_id,
)
from tests.routing.inputs import group, vectors

S, E = 6, 4
ROUTERS = [
    HashRouter(vocab_size=50),
    HashRouter(vocab_size=50, kind=HashKind.BALANCED),
    HashRouter(vocab_size=50, kind=HashKind.MODULO),
    *[UniformRandom(per=per, k=2) for per in DrawnPer],
    StaticGate((0.5, 0.0, 2.0, 0.0)),
]


@functools.cache
def compiled(router, num_experts, capacity):
    """Operation by operation takes twice as long."""
    return jax.jit(lambda inputs: router.route({}, inputs, num_experts, capacity))


def route(router, inputs, num_experts=E, capacity=S):
    router.validate(num_experts)
    return compiled(router, num_experts, capacity)(inputs)


def experts_of(router, inputs, num_experts=E):
    return np.asarray(route(router, inputs, num_experts).assignment.experts)


def balanced_by_hand(counts, num_experts):
    """Hash Layers' balanced assignment as a loop over ids and experts."""
    tokens, ids = [0] * num_experts, [0] * num_experts
    table = {}
    for v in sorted(range(len(counts)), key=lambda v: (-counts[v], v)):
        best = min(range(num_experts), key=lambda e: (tokens[e], ids[e], e))
        table[v] = best
        tokens[best] += counts[v]
        ids[best] += 1
    return [table[v] for v in range(len(counts))], tokens


def test_modulo_sends_ids_to_their_remainders():
    # V = 6, so id 7 counts as 1; C = 1, so the second token of an expert is dropped (slot 1).
    router = HashRouter(vocab_size=6, kind=HashKind.MODULO)
    inputs = group(vectors(5), token_ids=[0, 1, 5, 3, 7])
    routing = route(router, inputs, num_experts=3, capacity=1)
    np.testing.assert_array_equal(routing.assignment.experts, [[0], [1], [2], [0], [1]])
    np.testing.assert_array_equal(routing.assignment.position_in_expert, [[0], [0], [0], [1], [1]])
    np.testing.assert_array_equal(routing.assignment.gates, np.ones((5, 1)))
    np.testing.assert_array_equal(routing.probabilities, np.eye(3)[[0, 1, 2, 0, 1]])
    values = {name: mean.value() for name, mean in routing.statistics.items()}
    np.testing.assert_allclose(values["load"], [0.4, 0.4, 0.2], rtol=1e-6)
    np.testing.assert_allclose(values["dropped"], 0.4, rtol=1e-6)
    assert values["entropy"] == 0
    assert values["logsumexp_squared"] == 0
    assert routing.losses == {}


def test_balanced_ids_by_hand():
    # Descending: id 0 (5) to expert 0; id 2 (3) to 1; id 4 (3) to 1, which has 3 < 5; id 3 (2) to
    # 0, which has 5 < 6; id 1 (1) to 1, which has 6 < 7. Both end with 7 of the 14 tokens.
    table = expert_of_id(HashKind.BALANCED, 5, 2, 0, (5, 1, 3, 2, 3))
    np.testing.assert_array_equal(table, [0, 1, 1, 0, 1])
    # Ids that never occur are shared out as well.
    np.testing.assert_array_equal(
        expert_of_id(HashKind.BALANCED, 5, 2, 0, (9, 0, 0, 0, 0)), [0, 1, 1, 1, 1]
    )
    np.testing.assert_array_equal(
        expert_of_id(HashKind.BALANCED, 4, 2, 0, (0, 0, 0, 0)), [0, 1, 0, 1]
    )


@given(st.lists(st.integers(0, 20), min_size=1, max_size=30), st.integers(1, 8))
@settings(max_examples=30, deadline=None)
def test_the_balanced_table_equals_the_loop_and_is_balanced(counts, num_experts):
    expected, tokens = balanced_by_hand(counts, num_experts)
    table = expert_of_id(HashKind.BALANCED, len(counts), num_experts, 0, tuple(counts))
    np.testing.assert_array_equal(table, expected)
    assert max(tokens) - min(tokens) <= max(counts), "the last id made the gap"


def test_without_counts_all_ids_are_equally_frequent():
    router = HashRouter(vocab_size=10, kind=HashKind.BALANCED)
    experts = experts_of(router, group(vectors(10)))
    assert sorted(np.bincount(experts[:, 0])) == [2, 2, 3, 3]


def test_the_random_table_is_uniform_fixed_and_of_its_seed():
    table = expert_of_id(HashKind.RANDOM, 4000, 4, 0, ())
    # Three standard deviations of a count are 82.
    assert np.abs(np.bincount(table, minlength=4) - 1000).max() < 100
    # A trained model relies on these.
    np.testing.assert_array_equal(table[:8], [0, 3, 1, 0, 3, 3, 3, 3])
    assert (table != expert_of_id(HashKind.RANDOM, 4000, 4, 1, ())).any()
    assert table.dtype == np.int32
    with pytest.raises(ValueError, match="read-only"):
        table[0] = 1


@pytest.mark.parametrize("kind", HashKind)
def test_ids_outside_of_the_vocabulary_are_taken_modulo(kind):
    router = HashRouter(vocab_size=7, kind=kind)
    inside = experts_of(router, group(vectors(4), token_ids=[0, 3, 6, 2]))
    outside = experts_of(router, group(vectors(4), token_ids=[7, 703, -1, -5]))
    np.testing.assert_array_equal(inside, outside)


def test_the_hash_router_reads_its_fields():
    ids = group(vectors(16))
    counts = (1, 1, 1, 30, *[1] * 12)
    fields = [
        {"kind": HashKind.RANDOM},
        {"kind": HashKind.RANDOM, "seed": 1},
        {"kind": HashKind.MODULO},
        {"kind": HashKind.BALANCED, "token_counts": counts},
    ]
    tables = {tuple(experts_of(HashRouter(16, **f), ids)[:, 0].tolist()) for f in fields}
    assert len(tables) == 4


@pytest.mark.parametrize("k", [1, 3])
def test_draws_are_uniform_without_replacement(k):
    router = UniformRandom(k=k)
    inputs = group(vectors(16))

    def draw(key):
        routing = router.route({}, dataclasses.replace(inputs, key=key), E, 16)
        return routing.assignment

    assignment = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(3), 250))
    experts = np.asarray(assignment.experts).reshape(-1, k)
    for choice in range(k):  # 4000 draws: three standard deviations of a count are 82.
        assert np.abs(np.bincount(experts[:, choice], minlength=E) - 1000).max() < 120
    assert all(len(set(row)) == k for row in experts.tolist())
    np.testing.assert_allclose(assignment.gates, 1 / k, rtol=1e-6)
    # Neighbours are independent: they agree in their first choice one time in four.
    first = np.asarray(assignment.experts)[..., 0]
    assert abs((first[:, 1:] == first[:, :-1]).mean() - 0.25) < 0.04


def test_what_shares_a_draw_in_training():
    sequence_ids = np.repeat(np.arange(16), 3)
    inputs = group(vectors(48), sequence_ids=sequence_ids)
    other_group = dataclasses.replace(inputs, key=jax.random.key(77))
    other_step = dataclasses.replace(other_group, shared_key=jax.random.key(78))
    experts = {
        per: [
            experts_of(UniformRandom(per), case)[:, 0] for case in (inputs, other_group, other_step)
        ]
        for per in DrawnPer
    }
    assert [len(set(draws)) for draws in experts[DrawnPer.BATCH]] == [1, 1, 1]
    for draws in experts[DrawnPer.SEQUENCE]:
        assert (draws.reshape(16, 3) == draws[::3, None]).all()
        assert len(set(draws)) > 1
    for per in (DrawnPer.SEQUENCE, DrawnPer.BATCH):
        np.testing.assert_array_equal(experts[per][0], experts[per][1])
    assert (experts[DrawnPer.SEQUENCE][0] != experts[DrawnPer.SEQUENCE][2]).any()
    tokens = experts[DrawnPer.TOKEN]
    assert (tokens[0].reshape(16, 3) != tokens[0][::3, None]).any()
    assert (tokens[0] != tokens[1]).any()
    np.testing.assert_array_equal(tokens[1], tokens[2])


def test_one_expert_per_batch_changes_from_step_to_step():
    draws = {
        int(experts_of(UniformRandom(DrawnPer.BATCH), group(vectors(2), seed=seed))[0, 0])
        for seed in range(20)
    }
    assert draws == set(range(E))


@pytest.mark.parametrize("per", DrawnPer)
def test_evaluation_draws_by_position_alone(per):
    router = UniformRandom(per=per, k=2, seed=5)
    inputs = group(vectors(16), train=False)
    whole = experts_of(router, inputs)
    elsewhere = group(vectors(16, seed=1), train=False, seed=9, sequence_ids=np.arange(16) + 3)
    np.testing.assert_array_equal(whole, experts_of(router, elsewhere))
    for t in (0, 7, 15):  # A cache sees one token at a time.
        token = group(vectors(1), train=False, seed=t)
        alone = experts_of(router, dataclasses.replace(token, positions=jnp.array([t], jnp.int32)))
        np.testing.assert_array_equal(alone[0], whole[t])
    assert (len({tuple(row) for row in whole.tolist()}) > 1) == (per == DrawnPer.TOKEN)
    others = [experts_of(UniformRandom(per=per, k=2, seed=seed), inputs) for seed in range(5)]
    assert any((other != whole).any() for other in others), "the seed is not read"


def test_a_uniform_router_has_the_entropy_of_its_experts():
    routing = route(UniformRandom(), group(vectors(5)))
    np.testing.assert_allclose(routing.statistics["entropy"].value(), math.log(4), rtol=1e-6)
    np.testing.assert_allclose(routing.probabilities, 0.25, rtol=1e-6)
    np.testing.assert_allclose(routing.statistics["logsumexp_squared"].value(), 0, atol=1e-10)


def test_static_gates_by_hand():
    # The largest weight first; the second expert is skipped. Shares of |weights|: 1/4, 0, 3/4, so
    # the entropy is ln 4 - 3/4 ln 3 = 0.5623351. Two of three tokens find a slot in each expert.
    router = StaticGate((0.5, 0.0, 1.5))
    assert router.choices == 2
    routing = route(router, group(vectors(3)), num_experts=3, capacity=2)
    np.testing.assert_array_equal(routing.assignment.experts, [[2, 0]] * 3)
    np.testing.assert_array_equal(routing.assignment.gates, [[1.5, 0.5]] * 3)
    np.testing.assert_array_equal(routing.assignment.position_in_expert, [[0, 0], [1, 1], [2, 2]])
    np.testing.assert_allclose(routing.probabilities, [[0.25, 0, 0.75]] * 3, rtol=1e-6)
    values = {name: float(m.value()) for name, m in routing.statistics.items() if name != "load"}
    assert values == pytest.approx(
        {"dropped": 1 / 3, "entropy": 0.5623351, "logsumexp_squared": 0}, abs=1e-6
    )
    np.testing.assert_array_equal(routing.statistics["load"].value(), [1, 0, 1])


def test_static_gates_may_be_negative():
    routing = route(StaticGate((1.0, -3.0, 0.0, 0.0)), group(vectors(2)))
    np.testing.assert_array_equal(routing.assignment.experts, [[0, 1]] * 2)
    np.testing.assert_array_equal(routing.assignment.gates, [[1, -3]] * 2)
    np.testing.assert_allclose(routing.probabilities, [[0.25, 0.75, 0, 0]] * 2, rtol=1e-6)


@pytest.mark.parametrize("router", ROUTERS, ids=repr)
@pytest.mark.parametrize("train", [True, False])
def test_the_contract_holds_in_jit_vmap_and_a_group_of_padding(router, train):
    ids = jnp.array([[3, 9, 9, 40, 2, 77], [5, 5, 5, 5, 5, 5], [1, 2, 3, 4, 5, 6]])
    masks = jnp.array([[1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0], [1, 0, 1, 0, 1, 1]], bool)
    groups = [
        group(vectors(S, seed=g), mask=masks[g], token_ids=ids[g], seed=g, train=train)
        for g in range(3)
    ]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *groups)
    lifted = jax.jit(jax.vmap(lambda inputs: route(router, inputs, capacity=3)))(stacked)
    for leaf in jax.tree.leaves(lifted):
        assert jnp.isfinite(leaf).all()
        assert leaf.dtype in (jnp.int32, jnp.float32)
    for g in range(3):
        jax.tree.map(
            lambda got, expected, g=g: np.testing.assert_allclose(
                got[g], expected, rtol=1e-5, atol=1e-7
            ),
            lifted,
            route(router, groups[g], capacity=3),
        )
    assert lifted.assignment.experts.shape == (3, S, router.choices)
    assert (lifted.assignment.position_in_expert[~masks] == 3).all(), "padding took a slot"
    for mean in jax.tree.map(lambda leaf: leaf[1], lifted.statistics).values():
        assert mean.count == 0
        assert (mean.total == 0).all()
    np.testing.assert_allclose(lifted.probabilities.sum(axis=-1), 1, rtol=1e-6)
    assert router.leak is None
    assert router.loss_coefficients == {}
    assert router.init(jax.random.key(0), 8, E) == {}


@pytest.mark.parametrize("router", ROUTERS, ids=repr)
def test_padding_and_later_tokens_change_nothing(router):
    mask = np.array([True, True, False, True, True, True])
    ids = np.array([3, 9, 4, 9, 2, 7])
    before = route(router, group(vectors(S), mask=mask, token_ids=ids), capacity=2)
    # Another padding id, and another last token.
    other = group(
        vectors(S).at[2].set(9.0).at[5].set(7.0), mask=mask, token_ids=[3, 9, 33, 9, 2, 22]
    )
    after = route(router, other, capacity=2)
    for name in ("experts", "position_in_expert", "gates"):
        same = [0, 1, 3, 4]
        np.testing.assert_array_equal(
            getattr(before.assignment, name)[same, ...], getattr(after.assignment, name)[same, ...]
        )
    padding_only = group(vectors(S).at[2].set(9.0), mask=mask, token_ids=[3, 9, 33, 9, 2, 7])
    jax.tree.map(
        np.testing.assert_array_equal,
        before.statistics,
        route(router, padding_only, capacity=2).statistics,
    )


@pytest.mark.parametrize(
    ("router", "message"),
    [
        (HashRouter(0), "router.vocab_size is 0"),
        (HashRouter(5, seed=-1), "router.seed is -1"),
        (HashRouter(2, token_counts=(1, 2)), "router.token_counts is not read"),
        (HashRouter(5, HashKind.BALANCED, 0, (1, 2)), "router.token_counts has 2 entries"),
        (HashRouter(2, HashKind.BALANCED, 0, (1, -2)), "router.token_counts contains -2"),
        (UniformRandom(k=0), "router.k is 0"),
        (UniformRandom(k=5), "router.k is 5"),
        (UniformRandom(seed=-1), "router.seed is -1"),
        (StaticGate((1.0, 0.0)), "router.weights has 2 entries"),
        (StaticGate((1.0, 0.0, math.nan, 0.0)), "router.weights is"),
        (StaticGate((0.0, 0.0, 0.0, 0.0)), "router.weights are all 0"),
    ],
)
def test_fields_out_of_range_are_named(router, message):
    with pytest.raises(UserError, match=message) as error:
        router.validate(E)
    assert str(error.value).endswith(".")
