"""Claims that every router of the library must keep: causality, padding, capacity, sums of gates.

Groups under vmap, gradients, and gradients at exact balance are in tests/layers/test_inside_shard_map.py.
"""

import dataclasses
import functools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax import configuration
from moe_jax.errors import UserError
from moe_jax.layers.moe import MoEConfig
from moe_jax.models.decoder_lm import DecoderLMConfig
from moe_jax.routing import (
    balanced,
    capacity,
    catalogue,
    deepseek,
    expert_choice,
    fixed,
    losses,
    noisy_top_k,
    priority,
    scores,
    soft,
    token_choice,
)
from moe_jax.routing.capacity import Capacity
from moe_jax.routing.catalogue import ENTRIES
from moe_jax.routing.router import ExpertAssignment, Router, SoftAssignment, TokenAssignment
from tests.routing.inputs import group, vectors

S, D, E, V = 64, 8, 8, 264
TIGHT = 4  # Slots per expert, of 8 that balanced first choices need.
EVERY = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
IDS = np.random.default_rng(0).integers(0, V, S)
SEQUENCES = np.arange(S) // 16


@functools.cache
def parameters(index):
    """Random, and large enough for the router to be decided."""
    router = ENTRIES[index].router
    shapes = {**router.init(jax.random.key(0), D, E), **router.init_state(E)}
    keys = jax.random.split(jax.random.key(1), len(shapes) or 1)
    return {
        name: 0.5 * jax.random.normal(key, value.shape)
        for key, (name, value) in zip(keys, sorted(shapes.items()), strict=False)
    }


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def route(index, slots, train, parameters, x, token_ids, mask):
    inputs = group(x, mask=mask, token_ids=token_ids, sequence_ids=SEQUENCES, train=train)
    return ENTRIES[index].router.route(parameters, inputs, E, slots)


def routed(entry, slots, train, x, token_ids=IDS, mask=None):
    index = ENTRIES.index(entry)
    mask = np.ones(S, bool) if mask is None else mask
    arrays = (jnp.asarray(array) for array in (x, token_ids, mask))
    return route(index, slots, train, parameters(index), *arrays)


EXPERTS = jax.random.normal(jax.random.key(7), (E, D, D))


@jax.jit
def output(assigned, x):
    """What the layer would compute with one matrix per expert, as dense sums."""
    by_expert = jnp.einsum("sd,edf->sef", x, EXPERTS)
    if isinstance(assigned, SoftAssignment):
        slots = jnp.einsum("sep,sd,edf->epf", assigned.dispatch, x, EXPERTS)
        return jnp.einsum("sep,epf->sf", assigned.combine, slots)
    if isinstance(assigned, ExpertAssignment):
        expert = jnp.arange(E)[:, None]
        weights = jnp.zeros((S, E)).at[assigned.tokens, expert].set(assigned.gates, mode="drop")
    else:
        served = assigned.gates * (assigned.position_in_expert < assigned.capacity)
        token = jnp.arange(S)[:, None]
        weights = jnp.zeros((S, E)).at[token, assigned.experts].add(served, mode="drop")
    return jnp.einsum("se,sef->sf", weights, by_expert)


def sums_of_gates(assigned):
    if isinstance(assigned, SoftAssignment):
        return np.asarray(assigned.combine).sum(axis=(1, 2))
    if isinstance(assigned, ExpertAssignment):
        taken = np.asarray(assigned.tokens).reshape(-1)
        gates = np.asarray(assigned.gates).reshape(-1)
        return np.bincount(taken, gates, minlength=S + 1)[:S]
    return np.asarray(assigned.gates).sum(axis=1)


# The catalogue itself


def test_config_lines_make_the_routers_and_capacities():
    modules = (
        balanced, capacity, deepseek, expert_choice, fixed, losses, noisy_top_k, scores, priority,
        soft, token_choice,
    )  # fmt: skip
    names = {name: value for module in modules for name, value in vars(module).items()}
    for entry in ENTRIES:
        assert eval(configuration.config_line(entry.router), names) == entry.router
        if entry.capacity is not None:
            assert eval(configuration.config_line(entry.capacity), names) == entry.capacity


def test_config_json_names_every_router():
    for entry in ENTRIES:
        written = json.loads(json.dumps(configuration.encode(entry.router)))
        rebuilt = configuration.decode(written)
        assert rebuilt == entry.router and type(rebuilt) is type(entry.router)
        configuration.check_types(rebuilt)


@pytest.mark.parametrize(
    "entry", [entry for entry in ENTRIES if entry.router.leak], ids=lambda entry: entry.name
)
def test_a_decoder_refuses_routers_that_leak_and_says_what(entry):
    config = DecoderLMConfig(moe=MoEConfig(entry.router, group_size=S))
    with pytest.raises(UserError, match=re.escape(entry.router.leak)):
        config.validate()
    dataclasses.replace(config, accept_leak=True).validate()


def test_every_router_class_has_an_entry_and_can_be_in_a_config():
    leaves, todo = set(), [Router]
    while todo:
        cls = todo.pop()
        todo += cls.__subclasses__()
        if cls.__module__.startswith("moe_jax.") and not cls.__abstractmethods__:
            leaves.add(cls)
    assert leaves == {type(entry.router) for entry in ENTRIES}
    assert len({entry.name for entry in ENTRIES}) == len(ENTRIES)


def test_the_documentation_page_is_written_from_the_catalogue():
    page = pathlib.Path(__file__).parents[2] / "docs" / "routers.md"
    assert page.read_text() == catalogue.routers_page(), "run experiments/router_table.py"


@EVERY
def test_fields_and_capacity_work_for_eight_experts(entry):
    entry.router.validate(E)
    for train in (True, False):
        assert 1 <= entry.router.expert_capacity(entry.capacity or Capacity(), S, E, train) <= S
    route = routed(entry, TIGHT, True, vectors(S, D))
    assert route.losses.keys() == entry.router.loss_coefficients.keys()


# Causality


def depends_on_later(entry, slots, train, positions):
    """Whether changing one of the tokens changes an output before it."""
    x = np.asarray(vectors(S, D))
    before = np.asarray(output(routed(entry, slots, train, x).assignment, x))
    changed = []
    for t in positions:
        other, ids = x.copy(), IDS.copy()
        other[t], ids[t] = -2 * other[t], (ids[t] + 1) % V
        after = np.asarray(output(routed(entry, slots, train, other, ids).assignment, other))
        assert np.abs(after[t] - before[t]).max() > 0 or not after[t].any()
        changed.append(np.abs(after[:t] - before[:t]).max() > 1e-5)
    return any(changed)


@EVERY
def test_causality_is_declared_truly(entry):
    positions = range(1, S)
    if entry.router.leak is None:
        assert not depends_on_later(entry, TIGHT, True, positions), "training with drops"
        assert not depends_on_later(entry, TIGHT, False, positions), "evaluation with drops"
        assert not depends_on_later(entry, S, False, positions), "without drops"
    else:
        assert depends_on_later(entry, TIGHT, True, positions), "the declared leak does not exist"


# Padding


@EVERY
@pytest.mark.parametrize("slots", [TIGHT, S])
def test_contents_of_padding_change_nothing(entry, slots):
    train = slots == TIGHT
    mask = np.arange(S) % 5 != 3
    x = np.asarray(vectors(S, D))
    noise = np.where(mask[:, None], x, 50 * np.asarray(vectors(S, D, seed=5)))
    ids = np.where(mask, IDS, (IDS + 17) % V)
    plain = routed(entry, slots, train, x, IDS, mask)
    other = routed(entry, slots, train, noise, ids, mask)
    np.testing.assert_allclose(
        output(other.assignment, noise)[mask], output(plain.assignment, x)[mask], atol=1e-4
    )
    assert not np.asarray(output(plain.assignment, x))[~mask].any()
    for name, tree in {"losses": other.losses, "statistics": other.statistics}.items():
        expected = getattr(plain, name)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-5), tree, expected
        )


@EVERY
def test_a_group_of_padding_counts_nothing_and_is_finite(entry):
    route = routed(entry, TIGHT, True, vectors(S, D), mask=np.zeros(S, bool))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(route))
    for mean in (*route.losses.values(), *route.statistics.values()):
        assert not np.any(mean.total) and mean.count == 0
    assert not np.asarray(output(route.assignment, vectors(S, D))).any()


# Capacity and gates


@EVERY
@pytest.mark.parametrize("slots", [TIGHT, S])
def test_capacity_is_never_exceeded_and_no_slot_is_shared(entry, slots):
    assigned = routed(entry, slots, slots == TIGHT, vectors(S, D)).assignment
    if isinstance(assigned, SoftAssignment):
        np.testing.assert_allclose(np.asarray(assigned.dispatch).sum(axis=0), 1, rtol=1e-5)
        return
    if isinstance(assigned, ExpertAssignment):
        assert assigned.tokens.shape == (E, slots)
        for tokens in np.asarray(assigned.tokens):
            real = tokens[tokens < S]
            assert len(set(real)) == len(real)
        return
    experts, slot = np.asarray(assigned.experts), np.asarray(assigned.position_in_expert)
    held = slot < assigned.capacity
    pairs = list(zip(experts[held], slot[held], strict=True))
    assert len(pairs) == len(set(pairs))
    assert (experts[held] < E).all() and slot.min() >= 0 and assigned.capacity == slots
    if slots == S:
        assert (held == (experts < E)).all(), "dropped though there is room for all"


@EVERY
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), size=st.floats(0.1, 30))
def test_gates_sum_as_documented(entry, seed, size):
    sums = sums_of_gates(routed(entry, TIGHT, True, size * vectors(S, D, seed=seed)).assignment)
    low, high = entry.gates
    assert sums.min() >= low - 1e-4 * high and sums.max() <= high * (1 + 1e-4)


@EVERY
def test_documented_ranges_of_sums_of_gates_are_used(entry):
    """A decided router comes close to the upper end, where the lower is another."""
    low, high = entry.gates
    # Tokens that are 200 times as long make every softmax and sigmoid a step.
    sums = sums_of_gates(routed(entry, TIGHT, False, 200 * vectors(S, D)).assignment)
    assert low == high or sums.max() > 0.98 * high


@EVERY
def test_probabilities_are_distributions(entry):
    probabilities = np.asarray(routed(entry, TIGHT, True, vectors(S, D)).probabilities)
    assert probabilities.shape == (S, E) and probabilities.min() >= 0
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)


# Symmetry


def permutes(entry, slots, shuffle):
    """Whether permuting the tokens permutes the outputs, in evaluation."""
    x, shuffle = np.asarray(vectors(S, D)), np.array(shuffle)
    plain = output(routed(entry, slots, False, x).assignment, x)
    moved = output(
        routed(entry, slots, False, x[shuffle], IDS[shuffle]).assignment, jnp.asarray(x[shuffle])
    )
    return np.allclose(moved, np.asarray(plain)[shuffle], atol=1e-4)


# Draws by position, and the i-th slot for the i-th token, are about places and not tokens.
BY_PLACE = ("Uniform random, per token", "Soft MoE, identity")
REVERSED = list(range(S))[::-1]


@pytest.mark.parametrize(
    "entry", [entry for entry in ENTRIES if entry.name not in BY_PLACE], ids=lambda e: e.name
)
@settings(max_examples=5, deadline=None)
@given(shuffle=st.permutations(range(S)))
def test_without_drops_permuting_tokens_permutes_outputs(entry, shuffle):
    assert permutes(entry, S, shuffle)


@pytest.mark.parametrize("name", BY_PLACE)
def test_routing_by_place_does_not_follow_the_tokens(name):
    (entry,) = (entry for entry in ENTRIES if entry.name == name)
    assert not permutes(entry, S, REVERSED)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("V-MoE, Batch Prioritized Routing", True),
        ("V-MoE, assignment-level priority", True),
        ("Expert Choice", True),
        ("Switch", False),
        ("GShard top-2", False),
    ],
)
def test_with_drops_only_priorities_do_not_care_about_the_order(name, expected):
    (entry,) = (entry for entry in ENTRIES if entry.name == name)
    assert permutes(entry, TIGHT, REVERSED) == expected


# Unusual sizes

# One entry of each class; identity needs as many slots as tokens.
OF_EACH_CLASS = {type(entry.router): entry for entry in reversed(ENTRIES)}.values()


@pytest.mark.parametrize("entry", OF_EACH_CLASS, ids=lambda entry: entry.name)
@pytest.mark.parametrize("tokens", [1, 9])
def test_one_token_and_tokens_that_are_all_alike(entry, tokens):
    """S K / E below 1, S not divisible by 8, and all tokens want the same expert."""
    x = jnp.ones((tokens, D))

    @jax.jit
    def run(parameters, x):
        inputs = group(x, token_ids=np.zeros(tokens), sequence_ids=np.zeros(tokens))
        return entry.router.route(parameters, inputs, E, 1)

    route = run(parameters(ENTRIES.index(entry)), x)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(route))
    if isinstance(route.assignment, TokenAssignment):
        experts, slots = (
            np.asarray(route.assignment.experts),
            np.asarray(route.assignment.position_in_expert),
        )
        held = experts[slots == 0]
        assert len(held) and len(set(held)) == len(held), "one slot, one token"


@EVERY
def test_no_gate_is_larger_than_declared(entry):
    assigned = routed(entry, TIGHT, True, vectors(S, D)).assignment
    if not isinstance(assigned, SoftAssignment):
        assert np.asarray(assigned.gates).max() <= entry.router.largest_gate + 1e-5
