import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.routing import priority
from moe_jax.routing.priority import Priority

every_order = pytest.mark.parametrize("order", Priority)

# Three tokens, three experts, one slot each; token 0's second choice is better than token 1's
# first.
EXPERTS = np.array([[0, 1], [1, 0], [0, 2]])
GATES = np.array([[0.5, 0.45], [0.4, 0.3], [0.6, 0.35]], np.float32)
BY_HAND = {
    # t0 gets 0 and 1, t1 finds both full, t2 finds 0 full and gets 2.
    "token": [[0, 0], [1, 1], [1, 0]],
    # First choices: t0 gets 0, t1 gets 1, t2 finds 0 full. Second: 1 full, 0 full, t2 gets 2.
    "choice": [[0, 1], [0, 1], [1, 0]],
    # t2, t0, t1. First: t2 gets 0, t0 finds it full, t1 gets 1. Second: t2 gets 2, 1 and 0 full.
    "batch_priority": [[1, 1], [0, 1], [0, 0]],
    # .6 t2 gets 0; .5 full; .45 t0 gets 1; .4 full; .35 t2 gets 2; .3 full.
    "assignment_priority": [[1, 0], [1, 1], [0, 0]],
}


@functools.partial(jax.jit, static_argnames=("order", "num_experts", "train"))
def served(order, experts, gates, mask, num_experts, capacity, key, train=True, taken=None):
    priority_order = priority.permutation(order, gates, key, train)
    return priority.position_in_expert(experts, mask, num_experts, capacity, priority_order, taken)


@pytest.mark.parametrize("order", BY_HAND)
def test_who_gets_a_slot_by_hand(order):
    everyone = jnp.ones(3, bool)
    got = served(Priority(order), EXPERTS, GATES, everyone, 3, 1, jax.random.key(0))
    np.testing.assert_array_equal(got, BY_HAND[order])
    assert got.dtype == jnp.int32


def loop(order, experts, gates, mask, num_experts, capacity, *, taken=None, drawn=None):
    """Serves one assignment after the other, as `Priority` says."""
    tokens, choices = experts.shape
    match order:
        case "token":
            queue = [(s, k) for s in range(tokens) for k in range(choices)]
        case "choice":
            queue = [(s, k) for k in range(choices) for s in range(tokens)]
        case "batch_priority":
            by_largest = sorted(range(tokens), key=lambda s: -max(gates[s]))
            queue = [(s, k) for k in range(choices) for s in by_largest]
        case "assignment_priority":
            queue = [(s, k) for s in range(tokens) for k in range(choices)]
            queue.sort(key=lambda pair: -gates[pair])
        case "random":
            queue = [(int(i) // choices, int(i) % choices) for i in drawn]
    next_free = [0] * num_experts if taken is None else list(taken)
    slots = np.full(experts.shape, capacity)
    for s, k in queue:
        expert = experts[s, k]
        if mask[s] and expert < num_experts and next_free[expert] < capacity:
            slots[s, k] = next_free[expert]
            next_free[expert] += 1
    return slots


@st.composite
def wishes(draw, shapes=((7, 2, 5), (5, 3, 4), (9, 1, 3), (1, 1, 1))):
    """(experts [S, K], gates [S, K], mask [S], E): padding, ties and left-out choices anywhere."""
    tokens, choices, num_experts = draw(st.sampled_from(shapes))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    experts = np.argsort(generator.random((tokens, num_experts)), axis=1)[:, :choices]
    experts[:, 1:][generator.random((tokens, choices - 1)) < 0.2] = num_experts
    if draw(st.booleans()):
        experts[:, 0] = 0  # All tokens want one expert, some of them twice.
    gates = generator.integers(0, 4, (tokens, choices)).astype(np.float32) / 4
    mask = generator.random(tokens) < draw(st.sampled_from([0.0, 0.7, 1.0]))
    return experts, gates, mask, num_experts


@every_order
@given(case=wishes(), capacity=st.integers(1, 4), seed=st.integers(0, 99), second=st.booleans())
@settings(max_examples=30, deadline=None)
def test_slots_equal_the_loop(order, case, capacity, seed, second):
    experts, gates, mask, num_experts = case
    key = jax.random.key(seed)
    taken = np.random.default_rng(seed).integers(0, capacity + 1, num_experts) if second else None
    drawn = jax.random.permutation(key, experts.size)  # As documented: N assignments, shuffled.
    slots = np.asarray(served(order, experts, gates, mask, num_experts, capacity, key, taken=taken))
    expected = loop(order, experts, gates, mask, num_experts, capacity, taken=taken, drawn=drawn)
    np.testing.assert_array_equal(slots, expected)


@every_order
@given(case=wishes(), capacity=st.integers(1, 4), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_a_slot_has_one_token_and_a_buffer_no_more_than_its_capacity(order, case, capacity, seed):
    experts, gates, mask, num_experts = case
    key = jax.random.key(seed)
    slots = np.asarray(served(order, experts, gates, mask, num_experts, capacity, key))
    got = slots < capacity
    assert slots.min() >= 0
    assert slots.max() <= capacity
    assert not got[~mask].any(), "padding took a slot"
    assert not got[experts == num_experts].any(), "no choice took a slot"
    places = list(zip(experts[got], slots[got], strict=True))
    assert len(set(places)) == len(places), "two tokens in one slot"
    wanted = np.bincount(experts[mask].reshape(-1), minlength=num_experts + 1)[:num_experts]
    filled = priority.filled(jnp.asarray(experts), jnp.asarray(slots), num_experts, capacity)
    # No slot stays empty while somebody wants it.
    np.testing.assert_array_equal(filled, np.minimum(wanted, capacity))


@every_order
@given(case=wishes(shapes=((6, 2, 4),)))
@settings(max_examples=10, deadline=None)
def test_nobody_is_dropped_where_there_is_room_for_all(order, case):
    _, gates, mask, num_experts = case
    experts = np.tile([1, 3], (6, 1))
    slots = np.asarray(served(order, experts, gates, mask, num_experts, 6, jax.random.key(0)))
    assert (slots[mask] < 6).all()


@every_order
def test_contents_of_padding_change_nothing(order):
    generator = np.random.default_rng(0)
    experts = np.argsort(generator.random((8, 4)), axis=1)[:, :2]
    gates = generator.random((8, 2)).astype(np.float32)
    mask = np.array([True, False, True, True, False, True, True, False])
    others, louder = experts.copy(), gates.copy()
    others[~mask], louder[~mask] = [2, 0], 9.0
    key = jax.random.key(3)
    before, after = (
        served(order, e, g, mask, 4, 2, key) for e, g in ((experts, gates), (others, louder))
    )
    np.testing.assert_array_equal(before, after)


def test_taken_slots_by_hand():
    # Expert 0 has one of two slots left, expert 1 none, expert 2 both.
    experts = jnp.array([[0, 2], [0, 1], [2, 1], [2, 0]])
    slots = priority.position_in_expert(
        experts, jnp.ones(4, bool), 3, 2, taken=jnp.array([1, 2, 0])
    )
    np.testing.assert_array_equal(slots, [[1, 0], [2, 2], [1, 2], [2, 2]])


def test_filled_by_hand():
    # Expert 1 was wanted three times and has two slots; nobody made the last choice.
    experts, slots = jnp.array([[1, 0], [1, 2], [1, 3]]), jnp.array([[0, 0], [1, 0], [2, 2]])
    np.testing.assert_array_equal(priority.filled(experts, slots, 3, 2), [1, 2, 1])


def test_random_order_draws_in_training_only():
    key = jax.random.key(0)
    assert priority.permutation(Priority.RANDOM, jnp.asarray(GATES), key, train=False) is None
    drawn = priority.permutation(Priority.RANDOM, jnp.asarray(GATES), key, train=True)
    np.testing.assert_array_equal(np.sort(drawn), np.arange(6))


def test_random_order_is_fair():
    def first(key):
        return priority.permutation(Priority.RANDOM, jnp.asarray(GATES), key, train=True)[0]

    drawn = np.asarray(jax.jit(jax.vmap(first))(jax.random.split(jax.random.key(0), 3000)))
    # Six assignments: four standard deviations of a frequency around 1/6 are 0.027.
    np.testing.assert_allclose(np.bincount(drawn, minlength=6) / 3000, 1 / 6, atol=0.028)


@pytest.mark.parametrize("choices", [1, 2])
@every_order
def test_an_order_leaks_exactly_where_it_says(order, choices):
    # A later token changes its mind; did an earlier one's slot move?
    moved = False
    for seed in range(20):
        generator = np.random.default_rng(seed)
        experts = np.argsort(generator.random((6, 3)), axis=1)[:, :choices]
        gates = generator.random((6, choices)).astype(np.float32)
        changed, louder = experts.copy(), gates.copy()
        changed[-1], louder[-1] = np.roll(np.arange(3), seed)[:choices], 2.0
        before, after = (
            served(order, e, g, np.ones(6, bool), 3, 1, jax.random.key(seed))
            for e, g in ((experts, gates), (changed, louder))
        )
        moved = moved or bool((before[:-1] != after[:-1]).any())
    assert moved == (priority.leak_of(order, choices) is not None)
