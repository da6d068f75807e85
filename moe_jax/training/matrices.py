"""Which matrices a parameter holds, by the names of its dimensions.

A stacked parameter holds many (`moe_jax.parallel.sharding.STACKING_AXES`). An optimizer treats each of
them as if it were alone.
"""

import itertools
import math
from collections.abc import Sequence

from moe_jax.parallel.sharding import STACKING_AXES

# Neighbours that number one side of a matrix together.
_ONE_SIDE = (("heads", "head"), ("kv_heads", "head"), ("gates", "units"))


def own_dimensions(names: Sequence[str]) -> tuple[int, ...]:
    """Positions of the dimensions of each matrix or vector."""
    return tuple(i for i, name in enumerate(names) if name not in STACKING_AXES)


def is_matrix(names: Sequence[str]) -> bool:
    """False for vectors and scalars, such as norm scales and all biases."""
    own = [names[i] for i in own_dimensions(names)]
    joined = sum(pair in _ONE_SIDE for pair in itertools.pairwise(own))
    return len(own) - joined > 1


def rows_and_columns(
    shape: Sequence[int], names: Sequence[str], min_size: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Positions of the dimensions that number each matrix's rows, and those of its columns.

    Of the ways to cut [d, H, h] in two, the one with the fewest rows and columns in all is taken:
    [d, H * h] for an input projection, [H * h, d] for an output projection.

    Args:
      shape: of the parameter.
      names: of its dimensions.
      min_size: with fewer rows or columns all dimensions are rows'.
    """
    own = own_dimensions(names)

    def sizes(cut: int) -> tuple[int, int]:
        return math.prod(shape[i] for i in own[:cut]), math.prod(shape[i] for i in own[cut:])

    cuts = range(1, len(own))
    best = min(cuts, key=lambda cut: sum(sizes(cut)), default=len(own))
    if min(sizes(best)) < min_size:
        best = len(own)
    return own[:best], own[best:]
