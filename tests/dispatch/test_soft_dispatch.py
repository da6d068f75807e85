import jax.numpy as jnp
import numpy as np

from moe_jax.dispatch import soft
from moe_jax.routing.router import SoftAssignment

# Three tokens, two experts of one slot.
DISPATCH = jnp.array([[0.5, 0.0], [0.5, 0.25], [0.0, 0.75]])[:, :, None]
COMBINE = jnp.array([[1.0, 0.0], [0.25, 0.75], [0.5, 0.5]])[:, :, None]
ASSIGNMENT = SoftAssignment(DISPATCH, COMBINE)


def test_slots_are_mixtures_of_tokens_by_hand():
    x = jnp.array([[2.0, 4.0], [6.0, 8.0], [10.0, 0.0]])
    # (x0 + x1) / 2 and x1 / 4 + 3 x2 / 4.
    np.testing.assert_array_equal(soft.fill(x, ASSIGNMENT), [[[4, 6]], [[9, 2]]])


def test_outputs_are_mixtures_of_slots_by_hand():
    buffers = jnp.array([[[4.0, 0.0]], [[8.0, 2.0]]])
    np.testing.assert_array_equal(soft.combine(buffers, ASSIGNMENT), [[4, 0], [7, 1.5], [6, 1]])


def test_sums_are_float32_and_the_dtype_is_kept():
    # One after the other in bfloat16, 256 + 1 + 1 stays 256.
    values = jnp.array([[256.0], [1.0], [1.0]], jnp.bfloat16)
    filled = soft.fill(values, SoftAssignment(jnp.ones((3, 2, 1)), COMBINE))
    assert filled.dtype == jnp.bfloat16
    assert (filled == 258).all()
    combined = soft.combine(values[:, None], SoftAssignment(DISPATCH, jnp.ones((2, 3, 1))))
    assert combined.dtype == jnp.bfloat16
    assert (combined == 258).all()


def test_weights_are_not_rounded_to_the_narrow_dtype():
    weights = jnp.full((3, 1, 1), 1 + 2**-9)  # 1 in bfloat16.
    # 3 * 255 * (1 + 1/512) = 766.5, where bfloat16 has multiples of 4; 765 would give 764.
    filled = soft.fill(jnp.full((3, 1), 255, jnp.bfloat16), SoftAssignment(weights, weights))
    assert filled[0, 0, 0] == 768


def test_slots_of_an_expert_pass_for_tokens_of_their_own():
    weights = jnp.zeros((4, 3, 2))
    index = soft.slot_index(jnp.array([8, 9, 10, 11], jnp.int32), SoftAssignment(weights, weights))
    np.testing.assert_array_equal(index, [[8, 9], [8, 9], [8, 9]])
    assert index.dtype == jnp.int32
