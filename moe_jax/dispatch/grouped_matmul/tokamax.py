"""The grouped product by the tokamax package's Pallas kernels for NVIDIA GPUs (extra `gpu`).

Axis letters: R rows sorted by group, E groups, d and f widths.

Of tokamax 0.0.12: both kernels leave rows beyond the last group as they find them. Triton's outer
product of an empty group is not 0 (NaN or other groups' sums when its kernel is interpreted; tokamax
issues 887, 889, 1016). Mosaic's kernels for Hopper take 16-bit types only, and their source leaves
out what a width has beyond a multiple of the tile. tokamax 0.0.17, the one for JAX 0.12, has no Triton
kernels any more.
"""

import functools
import importlib.util
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.dispatch.grouped_matmul.ragged_dot import (
    ROWS_BY_MATRIX,
    ROWS_BY_ROWS,
    ROWS_BY_TRANSPOSED_MATRIX,
)

Implementation = Literal["mosaic", "triton"]


@functools.cache
def available() -> frozenset[Implementation]:
    """What the installed tokamax has; nothing without it."""
    if importlib.util.find_spec("tokamax") is None:
        return frozenset()
    files: dict[Implementation, str] = {"mosaic": "pallas_mosaic_gpu", "triton": "pallas_triton"}
    # The package does not tell, and asking for one that it lacks raises only when it is traced.
    folder = "tokamax._src.ops.ragged_dot"
    return frozenset(
        name for name, file in files.items() if importlib.util.find_spec(f"{folder}.{file}")
    )


def product(
    lhs: Float[Array, "R d"],
    rhs: Float[Array, "E d f"] | Float[Array, "E f d"],
    group_sizes: Int[Array, " E"],
    transpose_rhs: bool,
    implementation: Implementation,
) -> Float[Array, "R f"]:
    """Each row times its group's matrix: [R, d] and [E, d, f] ([E, f, d] transposed) to [R, f]."""
    dimensions = ROWS_BY_TRANSPOSED_MATRIX if transpose_rhs else ROWS_BY_MATRIX
    return _ragged_dot(lhs, rhs, group_sizes, dimensions, implementation)


def outer(
    lhs: Float[Array, "R d"],
    gradient: Float[Array, "R f"],
    group_sizes: Int[Array, " E"],
    implementation: Implementation,
) -> Float[Array, "E d f"]:
    """Each group's lhs^T gradient: [R, d] and [R, f] to [E, d, f] in lhs.dtype."""
    result = _ragged_dot(lhs, gradient, group_sizes, ROWS_BY_ROWS, implementation)
    return jnp.where((group_sizes > 0)[:, None, None], result, 0)


def fits_mosaic(lhs: Float[Array, "R d"], width: int) -> bool:
    """Whether Mosaic's kernels for Hopper compute [R, d] times d x f rightly; f = `width`."""
    return lhs.dtype.itemsize == 2 and lhs.shape[1] % 128 == 0 and width % 128 == 0


def _ragged_dot(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    dimensions: jax.lax.RaggedDotDimensionNumbers,
    implementation: Implementation,
) -> jax.Array:
    # The kernels accumulate in float32 and round once to this type.
    import tokamax  # Only where it is used: the package is in the extra `gpu`.

    return tokamax.ragged_dot_general(
        lhs,
        rhs,
        group_sizes,
        dimensions,
        preferred_element_type=lhs.dtype,
        implementation=implementation,
    )
