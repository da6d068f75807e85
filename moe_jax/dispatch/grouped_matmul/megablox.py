"""The grouped product by JAX's own Pallas kernels for TPUs, after MegaBlocks (arXiv 2211.15841).

Axis letters: R rows sorted by group, E groups, d and f widths.

The kernels leave rows beyond the last group as they find them, and want whole tiles of rows.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm
from jaxtyping import Array, Float, Int


def product(
    lhs: Float[Array, "R d"],
    rhs: Float[Array, "E d f"] | Float[Array, "E f d"],
    group_sizes: Int[Array, " E"],
    transpose_rhs: bool,
    interpret: bool = False,
) -> Float[Array, "R f"]:
    """Each row times its group's matrix: [R, d] and [E, d, f] ([E, f, d] transposed) to [R, f].

    Args:
      lhs, rhs, group_sizes, transpose_rhs: as everywhere.
      interpret: run the kernel's program on any device, slowly, as tests do.
    """
    width = rhs.shape[1] if transpose_rhs else rhs.shape[2]
    tiling = _tiling(lhs, width, group_sizes.shape[0])
    return gmm(
        _pad_rows(lhs, tiling[0]),
        rhs,
        group_sizes,
        lhs.dtype,
        tiling,
        transpose_rhs=transpose_rhs,
        interpret=interpret,
    )[: lhs.shape[0]]


def outer(
    lhs: Float[Array, "R d"],
    gradient: Float[Array, "R f"],
    group_sizes: Int[Array, " E"],
    interpret: bool = False,
) -> Float[Array, "E d f"]:
    """Each group's lhs^T gradient: [R, d] and [R, f] to [E, d, f] in lhs.dtype."""
    tiling = _tiling(lhs, gradient.shape[1], group_sizes.shape[0])
    return tgmm(
        _pad_rows(lhs, tiling[0]).T,
        _pad_rows(gradient, tiling[0]),
        group_sizes,
        lhs.dtype,
        tiling,
        interpret=interpret,
    )


def _tiling(lhs: jax.Array, width: int, groups: int) -> tuple[int, int, int]:
    """Tile sizes in rows, in lhs's width and in the other width.

    A group boundary inside a tile makes that tile count twice, so tiles have at most the rows of a
    mean group; but every tile of rows reads its matrix anew, which from 512 rows on costs less than
    the arithmetic does (v6e: 918e12 FLOP/s / 1.6e12 B/s = 560 FLOP per byte of bfloat16). Widths of
    1024 bfloat16 fill most of the 16 MiB of VMEM that a kernel gets; float32 gets half of them.
    """
    rows, depth = lhs.shape
    mean_group = rows // groups
    row_tile = 512 if mean_group >= 512 else 256 if mean_group >= 256 else 128
    widest = 2048 // lhs.dtype.itemsize
    return row_tile, _width_tile(depth, widest), _width_tile(width, widest)


def _width_tile(width: int, widest: int) -> int:
    """The whole width, or its largest divisor in lanes of 128, or else `widest` with a remainder."""
    if width <= widest:
        return width
    divisors = (tile for tile in range(widest, 255, -128) if width % tile == 0)
    return next(divisors, widest)


def _pad_rows(values: jax.Array, tile: int) -> jax.Array:
    return jnp.pad(values, ((0, -values.shape[0] % tile), (0, 0)))
