"""The grouped product by `jax.lax.ragged_dot_general`, which each compiler lowers as it likes.

Axis letters: R rows sorted by group, E groups, d and f widths.

For TPUs, XLA makes a kernel of the product and of its transpose; of the outer product it makes one
with libtpu 0.0.50, but with 0.0.42 it multiplies all rows by all groups. For CPUs it does that for
all three, in buffers of [E, R, d].
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# What each operation multiplies, as `lax` and tokamax write it.
ROWS_BY_MATRIX = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(([1], [1]), ([], [])),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[0],
)
ROWS_BY_TRANSPOSED_MATRIX = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(([1], [2]), ([], [])),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[0],
)
ROWS_BY_ROWS = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(([0], [0]), ([], [])),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[],
)


def product(
    lhs: Float[Array, "R d"],
    rhs: Float[Array, "E d f"] | Float[Array, "E f d"],
    group_sizes: Int[Array, " E"],
    transpose_rhs: bool,
) -> Float[Array, "R f"]:
    """Each row times its group's matrix: [R, d] and [E, d, f] ([E, f, d] transposed) to [R, f]."""
    return jax.lax.ragged_dot_general(
        lhs,
        rhs,
        group_sizes,
        ROWS_BY_TRANSPOSED_MATRIX if transpose_rhs else ROWS_BY_MATRIX,
        preferred_element_type=jnp.float32,
    ).astype(lhs.dtype)


def outer(
    lhs: Float[Array, "R d"], gradient: Float[Array, "R f"], group_sizes: Int[Array, " E"]
) -> Float[Array, "E d f"]:
    """Each group's lhs^T gradient: [R, d] and [R, f] to [E, d, f] float32."""
    return jax.lax.ragged_dot_general(
        lhs, gradient, group_sizes, ROWS_BY_ROWS, preferred_element_type=jnp.float32
    )
