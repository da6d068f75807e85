"""Matrix products and convolutions: their FLOPs, from the shapes."""

import dataclasses
import itertools
import math
import re
from collections.abc import Sequence

import numpy as np

from moe_jax.analysis.hlo.text import Array, Instruction, Shape, arrays_of
from moe_jax.analysis.hlo.trips import Trips


@dataclasses.dataclass(frozen=True)
class MatrixProduct:
    """A matrix product or convolution.

    Attributes:
      op_name: see `Instruction`.
      flops: of one run on one device, two per multiply-add.
      trips: how often it runs.
    """

    op_name: str
    flops: int
    trips: Trips


def product_flops(instruction: Instruction, operands: Sequence[Shape]) -> int:
    """FLOPs of one run; 0 for what is no matrix product.

    Args:
      instruction: a dot, a convolution, a cuBLAS call, or anything else.
      operands: their shapes.
    """
    opcode = instruction.opcode
    cublas = opcode == "custom-call" and "__cublas$" in instruction.attributes
    if opcode not in ("dot", "convolution") and not cublas:
        return 0
    left, right = itertools.islice(itertools.chain.from_iterable(map(arrays_of, operands)), 2)
    result = next(arrays_of(instruction.shape))
    if opcode == "convolution":
        return _convolution_flops(left, right, result, instruction.attributes)
    contracted = re.search(
        r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)', instruction.attributes
    )
    dims = re.findall(r"\d+", contracted[1]) if contracted else []
    return 2 * result.elements * math.prod(left.dims[int(dim)] for dim in dims)


def _convolution_flops(left: Array, right: Array, result: Array, attributes: str) -> int:
    """2 per multiply-add of a window with the input; positions outside the input are not counted.

    TPUs compute batched matrix products as convolutions most of whose window lies on dilation.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    if not labels:
        raise ValueError(f"a convolution without dim_labels: {attributes[:200]!r}")
    lhs, rhs, out = (labels[i] for i in (1, 2, 3))
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", _window(attributes)))
    multiplied = 1
    for i in range(sum(label.isdigit() for label in lhs)):

        def of(name: str, default: int, i: int = i) -> int:
            return int(window[name].split("x")[i]) if name in window else default

        multiplied *= _hits(
            size=left.dims[lhs.index(str(i))],
            outputs=result.dims[out.index(str(i))],
            window=of("size", 1),
            stride=of("stride", 1),
            low=int(window["pad"].split("x")[i].split("_")[0]) if "pad" in window else 0,
            dilation=of("lhs_dilate", 1),
            window_dilation=of("rhs_dilate", 1),
        )
    batch, features = result.dims[out.index("b")], result.dims[out.index("f")]
    return 2 * batch * features * right.dims[rhs.index("i")] * multiplied


def _window(attributes: str) -> str:
    found = re.search(r"window=\{([^}]*)\}", attributes)
    return found[1] if found else ""


def _hits(
    size: int, outputs: int, window: int, stride: int, low: int, dilation: int, window_dilation: int
) -> int:
    """Pairs of an output and a window position that meet an input, along one dimension."""
    position = (
        np.arange(outputs)[:, None] * stride + np.arange(window)[None, :] * window_dilation - low
    )
    inside = (position >= 0) & (position <= (size - 1) * dilation) & (position % dilation == 0)
    return int(inside.sum())
