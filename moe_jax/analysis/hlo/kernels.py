"""Kernels that are opaque to XLA: Pallas's for TPUs and GPUs, and cuDNN's attention.

XLA knows what their author says of them: an estimate on TPUs, nothing on GPUs, where the shapes tell.
"""

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
        (`pl.CostEstimate`); of splash attention, cuDNN's attention and grouped products on GPUs, which
        give none, by their shapes; 0 for others. That of a grouped matrix product is of a full buffer of
        rows; it skips rows that belong to no group.
      bytes: what one run moves between HBM and the core: the kernel's own estimate, or else its
        operands and results once, so that what it reads again for each block is not counted.
      trips: how often it runs.
    """

    op_name: str
    flops: int
    bytes: int
    trips: Trips


def is_kernel(instruction: Instruction) -> bool:
    """Whether it is one of these kernels."""
    return instruction.opcode == "custom-call" and bool(_target(instruction))


# Pallas for TPUs, Pallas for GPUs by Mosaic and by Triton, and attention by cuDNN.
_TARGETS = re.compile(
    r'custom_call_target="(tpu_custom_call|mosaic_gpu\w*|__gpu\$xla\.gpu\.triton|__cudnn\$fmha\w+)"'
)


def _target(instruction: Instruction) -> str:
    """The target that a kernel's custom call names; empty for any other instruction."""
    # The name stands before what a kernel's author wrote, which may be of any length.
    found = _TARGETS.search(instruction.attributes, 0, 200)
    return found[1] if found else ""


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
    target = _target(instruction)
    if target == "tpu_custom_call":
        flops = flops or _splash_flops(instruction, arrays, op_name)
    elif target.startswith("__cudnn$fmha"):
        flops = _cudnn_flops(instruction, arrays)
    elif _GROUPED.search(instruction.attributes):
        flops = _grouped_flops(instruction, arrays)
    return Kernel(op_name, flops, moved, trips)


# Names of tokamax's kernels: of the product, and of rows by rows.
_GROUPED = re.compile(r"ragged_(?:contracting_dim_)?dot")


def _grouped_flops(instruction: Instruction, operands: Sequence[Array]) -> int:
    """FLOPs of a grouped product of tokamax: rows by their group's matrix, or rows by rows of a group.

    [R, d] by [E, d, f] gives [R, f], [R, d] by [R, f] gives [E, d, f], each possibly transposed. In all
    cases the three arrays have E * (R d f)^2 elements multiplied.

    Args:
      instruction: the kernel, whose result is the product.
      operands: among integers that say where groups begin, the two factors.
    """
    factors = [array for array in operands if array.dtype in _FLOATS]
    three = [*factors, *arrays_of(instruction.shape)][:3]
    groups = math.prod(array.dims[0] for array in three if len(array.dims) == 3)
    return 2 * math.isqrt(math.prod(array.elements for array in three) // groups)


def _cudnn_flops(instruction: Instruction, operands: Sequence[Array]) -> int:
    """FLOPs of cuDNN's flash attention; see `cudnn_widths` and `cudnn_pairs`.

    Args:
      instruction: the kernel, whose configuration names the mask.
      operands: query [B, L, H, h], key [B, M, J, h], value [B, M, J, v], and others.
    """
    (batch, length, heads, width), (_, key_length, _, _), (*_, value_width) = (
        array.dims for array in operands[:3]
    )
    causal = re.search(r'"mask_type":\s*"\w*CAUSAL', instruction.attributes) is not None
    forward, backward = cudnn_widths(width, value_width)
    widths = backward if "Backward" in _target(instruction) else forward
    return 2 * batch * heads * cudnn_pairs(length, key_length, causal) * widths


_FLOATS = ("bf16", "f16", "f32")


def cudnn_widths(width: int, value_width: int) -> tuple[int, int]:
    """Multiply-adds for a pair of a query and a key: (forward, backward).

    Forward are the scores (h) and their product with the values (v). Backward, which keeps no scores: the
    scores anew (h), the gradients of the weights (v), the values (v), the queries and the keys (h each).
    """
    return width + value_width, 3 * width + 2 * value_width


def cudnn_pairs(length: int, key_length: int, causal: bool) -> int:
    """Pairs of a query and a key in one head: all, or those in blocks that are not wholly masked.

    cuDNN does not say how large its blocks are; 128 x 128 are usual on Hopper, and a block on the diagonal
    counts whole.
    """
    if not causal or length % 128 or key_length % 128:
        return length * key_length
    return causal_scores(length, key_length, 128, 128)


# The products of splash attention's kernels for each pair of a query and a key: how many contract or
# produce the head's width, and how many the values' width. The backward pass computes the scores
# anew, in both of its kernels.
_SPLASH_PRODUCTS = {"fwd": (1, 1), "dq": (2, 1), "dkv": (2, 2)}


def _splash_flops(instruction: Instruction, operands: Sequence[Array], op_name: str) -> int:
    """FLOPs of jax.experimental.pallas.ops.tpu.splash_attention; 0 for another kernel.

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
    first = next(i for i, array in enumerate(operands) if array.dtype in _FLOATS)
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
