import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.dispatch import gather
from moe_jax.dispatch.slots import slot_table
from moe_jax.routing.router import ExpertAssignment, TokenAssignment


@pytest.fixture
def assignment():
    """Two experts of two slots; token 2 lost its second choice, token 3 everything."""
    experts = jnp.array([[0, 1], [1, 0], [0, 1], [0, 1]], jnp.int32)
    slots = jnp.array([[0, 0], [1, 1], [2, 2], [2, 2]], jnp.int32).at[2, 1].set(1)
    slots = slots.at[1, 0].set(2)
    return TokenAssignment(experts, slots, jnp.array([[1.0, 2.0]] * 4), capacity=2)


def test_slot_table_by_hand(assignment):
    np.testing.assert_array_equal(slot_table(assignment, 3), [[0, 1], [0, 2], [4, 4]])


def test_fill_leaves_zeros_in_empty_slots(assignment):
    rows = gather.Gather().fill(jnp.array([[1.0], [2.0], [3.0], [4.0]]), assignment, 3)
    np.testing.assert_array_equal(rows[..., 0], [[1, 2], [1, 3], [0, 0]])


def test_combine_by_hand(assignment):
    buffers = jnp.arange(1.0, 5.0).reshape(2, 2, 1)
    y = gather.combine(buffers, assignment, 4)
    # 1*1 + 2*3; second choice only; second choice only; nothing.
    np.testing.assert_array_equal(y, [[7], [4], [8], [0]])


def test_combine_sums_in_float32_and_keeps_the_dtype(assignment):
    buffers = jnp.full((2, 2, 1), 1 / 3, jnp.bfloat16)
    y = gather.combine(buffers, assignment, 4)
    assert y.dtype == jnp.bfloat16
    assert y[0, 0] == (3 * buffers[0, 0, 0].astype(jnp.float32)).astype(jnp.bfloat16)


CHOSEN = ExpertAssignment(
    jnp.array([[1, 0], [1, 3]], jnp.int32), jnp.array([[10.0, 1.0], [5.0, 7.0]])
)


def test_expert_choice_by_hand():
    np.testing.assert_array_equal(slot_table(CHOSEN, 2), CHOSEN.tokens)
    y = gather.combine(jnp.arange(1.0, 5.0).reshape(2, 2, 1), CHOSEN, 3)
    # 1*2; 10*1 + 5*3; nothing. The slot with 4 is empty and its gate is not read.
    np.testing.assert_array_equal(y, [[2], [25], [0]])


def test_expert_choice_sums_in_float32_and_keeps_the_dtype():
    # One after the other in bfloat16, 256 + 1 + 1 stays 256.
    ones = jnp.ones((3, 1, 1), jnp.bfloat16)
    chosen = ExpertAssignment(jnp.zeros((3, 1), jnp.int32), jnp.array([[256.0], [1.0], [1.0]]))
    y = gather.combine(ones, chosen, 1)
    assert y.dtype == jnp.bfloat16
    assert y[0, 0] == 258
