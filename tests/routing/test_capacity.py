import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.errors import UserError
from moe_jax.routing.capacity import Capacity, CapacityRule, capacity_by_rule

# rule: (S, K, E, capacity factor, the reference's number).
BY_HAND = {
    "switch": [
        (64, 1, 8, 1.0, 8),
        (64, 1, 8, 1.25, 10),
        (64, 2, 8, 1.25, 20),  # K counts.
        (60, 1, 8, 1.0, 8),  # 7.5 rounds up.
        (64, 1, 8, 1.1, 9),  # 8.8
        (100, 1, 10, 1.1, 11),  # 100 * 1.1 / 10 is 11.000000000000002 in floating point.
        (3, 1, 8, 1.0, 1),  # Fewer tokens than experts.
        (64, 1, 8, 1e-3, 1),
        (4, 2, 2, 2.0, 8),  # Above S.
    ],
    "mesh": [
        (64, 1, 8, 1.25, 10),
        (64, 2, 8, 1.25, 10),  # K does not count.
        (60, 1, 8, 1.0, 7),  # 7.5 is cut off.
        (100, 1, 5, 1.15, 23),  # 22.999999999999996 in floating point.
        (64, 1, 32, 1.0, 4),  # 2, but at least 4.
        (16, 1, 2, 4.0, 16),  # 32, but at most S.
        (3, 1, 8, 1.0, 4),  # The minimum comes last, above S.
    ],
    "flaxformer": [
        (64, 2, 8, 1.25, 10),  # K does not count.
        (36, 1, 8, 1.0, 4),  # 4.5, half to even.
        (44, 1, 8, 1.0, 6),  # 5.5, half to even.
        (52, 1, 8, 1.0, 6),  # 6.5, half to even.
        (100, 1, 10, 1.15, 12),  # 11.5, but 11.499999999999998 in floating point.
        (61, 1, 8, 1.0, 8),  # 7.625
        (8, 1, 8, 1.0, 4),  # 1, but at least 4.
    ],
    "praxis": [
        (64, 2, 8, 1.25, 10),  # K does not count.
        (60, 1, 8, 1.0, 7),
        (64, 1, 32, 1.0, 2),  # No minimum
        (64, 1, 128, 1.0, 0),  # at all.
    ],
    "gshard": [
        (64, 2, 8, 1.0, 16),  # 2 S / E
        (64, 1, 8, 1.0, 16),  # whatever K is.
        (62, 2, 8, 1.0, 16),  # 15.5 rounds up.
        (60, 2, 8, 1.25, 19),  # 18.75
    ],
    "vmoe_ceil": [
        (64, 2, 8, 1.25, 20),  # K counts; a multiple of 4 stays.
        (64, 1, 8, 1.05, 12),  # 8.4, 9, 12
        (4, 1, 16, 1.0, 4),  # 0.25, 1, 4
    ],
    "vmoe_round": [
        (64, 2, 8, 1.05, 20),  # 16.8, 17, 20
        (64, 1, 8, 1.05, 8),  # 8.4, 8
        (36, 1, 8, 1.0, 4),  # 4.5, half to even
        (44, 1, 8, 1.0, 8),  # 5.5, 6, 8
        (4, 1, 16, 1.0, 0),  # 0.25; zero is a multiple of 4.
    ],
    "expert_choice": [
        (64, 1, 8, 2.0, 16),
        (64, 2, 8, 2.0, 16),  # K does not count.
        (66, 1, 8, 1.0, 9),  # 8.25
    ],
    "soft_moe": [
        (64, 1, 8, 1.0, 8),
        (64, 2, 8, 1.0, 8),  # K does not count.
        (36, 1, 8, 1.0, 4),  # 4.5, half to even.
        (44, 1, 8, 1.0, 6),  # 5.5, half to even.
        (4, 1, 16, 1.0, 0),
    ],
    "deepspeed": [
        (64, 2, 8, 1.25, 20),  # K counts.
        (66, 1, 8, 1.0, 9),  # 8.25
        (16, 1, 8, 1.0, 4),  # 2, but at least 4.
    ],
    "no_drops": [(64, 2, 8, 1.25, 64), (5, 1, 1, 0.1, 5)],
}


def test_every_rule_has_its_numbers():
    assert set(BY_HAND) == set(CapacityRule)


@pytest.mark.parametrize(
    ("rule", "tokens", "choices", "experts", "factor", "slots"),
    [(rule, *row) for rule, rows in BY_HAND.items() for row in rows],
)
def test_slots_worked_out_by_hand(rule, tokens, choices, experts, factor, slots):
    rule = CapacityRule(rule)
    assert capacity_by_rule(rule, tokens, choices, experts, factor) == slots
    if slots:
        # A token takes at most one slot of an expert, so more than S are never filled.
        capacity = Capacity(rule=rule, train_factor=factor)
        assert capacity.expert_capacity(tokens, choices, experts, train=True) == min(slots, tokens)


def test_training_and_evaluation_have_their_own_factor():
    capacity = Capacity(train_factor=1.25, evaluation_factor=2.0)
    assert capacity.expert_capacity(64, 1, 8, train=True) == 10
    assert capacity.expert_capacity(64, 1, 8, train=False) == 16


@given(st.integers(1, 4096), st.integers(1, 4), st.integers(1, 64), st.floats(1.0, 16.0))
@settings(max_examples=30, deadline=None)
def test_a_factor_of_one_or_more_has_room_for_balanced_tokens(tokens, choices, experts, factor):
    choices = min(choices, experts)
    for rule in ("switch", "vmoe_ceil", "deepspeed", "no_drops"):
        capacity = Capacity(rule=CapacityRule(rule), train_factor=factor)
        slots = capacity.expert_capacity(tokens, choices, experts, train=True)
        assert 1 <= slots <= tokens
        assert slots * experts >= tokens * choices


@given(
    st.sampled_from(CapacityRule),
    st.integers(1, 300),
    st.integers(1, 64),
    st.floats(0.25, 4.0),
    st.floats(1.0, 2.0),
)
@settings(max_examples=30, deadline=None)
def test_a_larger_factor_never_has_less_room(rule, tokens, experts, factor, larger):
    small = capacity_by_rule(rule, tokens, 1, experts, factor)
    assert 0 <= small <= capacity_by_rule(rule, tokens, 1, experts, larger * factor)


@pytest.mark.parametrize("rule", ["praxis", "vmoe_round", "soft_moe"])
@pytest.mark.parametrize(("train", "name"), [(True, "train_factor"), (False, "evaluation_factor")])
def test_a_rule_that_gives_no_slot_is_refused(rule, train, name):
    capacity = Capacity(rule=CapacityRule(rule), train_factor=0.5, evaluation_factor=0.5)
    message = (
        rf"capacity.{name} is 0.5, which with capacity.rule={rule}, 4 tokens per group and 16 "
        r"experts gives experts no slot \(zero capacity\); raise the factor or moe.group_size\."
    )
    with pytest.raises(UserError, match=message):
        capacity.expert_capacity(4, 1, 16, train)


@pytest.mark.parametrize("name", ["train_factor", "evaluation_factor"])
@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan")])
def test_zero_capacity_is_refused(name, factor):
    with pytest.raises(UserError, match=rf"capacity.{name} is {factor}.*zero capacity.*above 0"):
        Capacity(**{name: factor}).validate()


@pytest.mark.parametrize("name", ["train_factor", "evaluation_factor"])
def test_infinite_capacity_is_refused(name):
    with pytest.raises(UserError, match=rf"capacity.{name} is inf; it must be a finite number"):
        Capacity(**{name: float("inf")}).validate()
