import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.errors import UserError
from moe_jax.routing.capacity import Capacity


@pytest.mark.parametrize(
    ("tokens", "choices", "experts", "factor", "slots"),
    [
        (64, 1, 8, 1.0, 8),
        (64, 1, 8, 1.25, 10),
        (64, 2, 8, 1.25, 20),
        (60, 1, 8, 1.0, 8),  # 7.5 rounds up.
        (80, 1, 8, 1.1, 11),  # 80 * 1.1 is 88.00000000000001 in floating point.
        (3, 1, 8, 1.0, 1),  # Fewer tokens than experts.
        (4, 2, 2, 2.0, 4),  # A token takes at most one slot of an expert.
        (64, 1, 8, 1e-3, 1),
    ],
)
def test_slots(tokens, choices, experts, factor, slots):
    capacity = Capacity(train_factor=factor, evaluation_factor=100.0)
    assert capacity.slots(tokens, choices, experts, train=True) == slots
    assert capacity.slots(tokens, choices, experts, train=False) == tokens


@given(st.integers(1, 4096), st.integers(1, 4), st.integers(1, 64), st.floats(1.0, 16.0))
@settings(derandomize=True)
def test_a_factor_of_one_or_more_has_room_for_balanced_tokens(tokens, choices, experts, factor):
    choices = min(choices, experts)
    slots = Capacity(train_factor=factor).slots(tokens, choices, experts, train=True)
    assert 1 <= slots <= tokens
    assert slots * experts >= tokens * choices


@pytest.mark.parametrize("name", ["train_factor", "evaluation_factor"])
@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan")])
def test_zero_capacity_is_refused(name, factor):
    with pytest.raises(UserError, match=rf"capacity.{name} is {factor}.*zero capacity.*above 0"):
        Capacity(**{name: factor}).validate()
