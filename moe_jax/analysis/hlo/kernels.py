"""Pallas kernels for TPUs (Mosaic): opaque to XLA, which knows only what their author says of them."""

import dataclasses
import math
import re
from collections.abc import Sequence

from moe_jax.analysis.hlo.text import Array, Instruction, Shape, arrays_of
from moe_jax.analysis.hlo.trips import Trips


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel.

    Attributes:
      op_name: see `Instruction`.
      flops: of one run on one device, two per multiply-add: the kernel's own cost estimate
        (`pl.CostEstimate`); of splash attention, which gives none, by its blocks; 0 for others. The
        estimate of a grouped matrix product is that of a full buffer of rows; it skips rows that
        belong to no group.
      bytes: what one run moves between HBM and the core: the kernel's own estimate, or else its
        operands and results once, so that what it reads again for each block is not counted.
      trips: how often it runs.
    """

    op_name: str
    flops: int
    bytes: int
    trips: Trips


def is_kernel(instruction: Instruction) -> bool:
    """Whether it is a Pallas kernel for TPUs."""
    return (
        instruction.opcode == "custom-call"
        and 'custom_call_target="tpu_custom_call"' in instruction.attributes
    )


def kernel_of(
    instruction: Instruction, operands: Sequence[Shape], op_name: str, trips: Trips
) -> Kernel:
    """Reads a kernel.

    Args:
      instruction: one of which `is_kernel` is true.
      operands: their shapes.
      op_name: see `Instruction`.
      trips: how often it runs.
    """
    estimate = re.search(r'"cost_estimate":\{([^}]*)\}', instruction.attributes)
    figures = dict(re.findall(r'"(\w+)":"(\d+)"', estimate[1])) if estimate else {}
    flops, moved = int(figures.get("flops", 0)), int(figures.get("bytes_accessed", 0))
    arrays = [array for shape in operands for array in arrays_of(shape)]
    if not moved:
        every = (*arrays, *arrays_of(instruction.shape))
        moved = sum(array.bytes for array in every if array.in_main_memory)
    return Kernel(op_name, flops or _splash_flops(instruction, arrays, op_name), moved, trips)


# The products of splash attention's kernels for each pair of a query and a key: how many contract or
# produce the head's width, and how many the values' width. The backward pass computes the scores
# anew, in both of its kernels.
_SPLASH_PRODUCTS = {"fwd": (1, 1), "dq": (2, 1), "dkv": (2, 2)}


def _splash_flops(instruction: Instruction, operands: Sequence[Array], op_name: str) -> int:
    """Of jax.experimental.pallas.ops.tpu.splash_attention; 0 for another kernel.

    Blocks of the scores that are wholly masked are skipped. Which those are stands in a constant that
    the text leaves out; a kernel that is given the positions of queries is taken to be causal, and
    any other one to skip nothing.

    Args:
      instruction: the kernel.
      operands: schedule..., query [..., H, L, h], key [..., J, M, h], value [..., J, M, v], and among
        the others int32 segments of queries and of keys, or none, and positions of queries, or none.
      op_name: has the kernel's name in it.
    """
    name = re.search(r"/splash_m[hq]a_(fwd|dq|dkv)_", op_name)
    if not name:
        return 0
    first = next(i for i, array in enumerate(operands) if array.dtype in ("bf16", "f16", "f32"))
    query, key, value, *others = operands[first:]
    length, key_length = query.dims[-2], key.dims[-2]
    scores = length * key_length
    if sum(array.dtype == "s32" for array in others) % 2:
        suffix = "" if name[1] == "fwd" else f"_{name[1]}"
        blocks = re.findall(rf'block_(?:q|kv){suffix}\\": (\d+)', instruction.attributes)
        scores = causal_scores(length, key_length, *map(int, blocks))
    of_head, of_value = _SPLASH_PRODUCTS[name[1]]
    widths = of_head * query.dims[-1] + of_value * value.dims[-1]
    return 2 * math.prod(query.dims[:-2]) * scores * widths


def causal_scores(length: int, key_length: int, rows: int, columns: int) -> int:
    """Scores in blocks of [rows, columns] in which some query reads a key up to its own position."""
    last_queries = range(rows - 1, length, rows)
    blocks = sum(min(last // columns + 1, key_length // columns) for last in last_queries)
    return rows * columns * blocks
