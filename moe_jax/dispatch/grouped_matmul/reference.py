"""Every row times every group's matrix, of which one is kept: slow and obvious, for comparisons.

Axis letters: R rows sorted by group, E groups, d and f widths. The work is E times what is needed.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def product(
    lhs: Float[Array, "R d"],
    rhs: Float[Array, "E d f"] | Float[Array, "E f d"],
    group_sizes: Int[Array, " E"],
    transpose_rhs: bool,
) -> Float[Array, "R f"]:
    """Each row times its group's matrix: [R, d] and [E, d, f] ([E, f, d] transposed) to [R, f]."""
    groups = _group_of_rows(group_sizes, lhs.shape[0])
    result = jnp.zeros((), jnp.float32)
    for group in range(rhs.shape[0]):
        matrix = rhs[group].T if transpose_rhs else rhs[group]
        values = jnp.matmul(lhs, matrix, preferred_element_type=jnp.float32)
        result = jnp.where((groups == group)[:, None], values, result)
    return result.astype(lhs.dtype)


def outer(
    lhs: Float[Array, "R d"], gradient: Float[Array, "R f"], group_sizes: Int[Array, " E"]
) -> Float[Array, "E d f"]:
    """Each group's lhs^T gradient: [R, d] and [R, f] to [E, d, f] float32."""
    groups = _group_of_rows(group_sizes, lhs.shape[0])

    def of_group(group: int) -> jax.Array:
        rows = jnp.where((groups == group)[:, None], lhs, 0)
        return jnp.matmul(rows.T, gradient, preferred_element_type=jnp.float32)

    return jnp.stack([of_group(group) for group in range(group_sizes.shape[0])])


def _group_of_rows(group_sizes: jax.Array, rows: int) -> jax.Array:
    """[R] int32; E for rows beyond the last group."""
    return jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(rows), side="right")
