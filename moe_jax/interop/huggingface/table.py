"""Tables of which tensor of a checkpoint is which part of which parameter.

Written once per family and read in both directions.

Axis letters of layouts: d width, f feed-forward width, H heads, J heads of keys and values, h head
width, q c ranks of latent attention, n v widths of its heads, E experts, V vocabulary, R buckets.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from moe_jax.interop.huggingface.layout import Layout, Region
from moe_jax.models.stack import StackConfig


class TensorRow(NamedTuple):
    """One line of a table.

    Attributes:
      ours: path of a parameter and, in brackets, its part: `mlp/w_in[{expert}]`, `qkv[:, 0]`.
        A model may lack it: then the line says nothing.
      theirs: name of a tensor.
      layout: see `Layout.parse`.
      interleaved: see `Layout`.
    """

    ours: str
    theirs: str
    layout: str
    interleaved: int = 0


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of one model's checkpoint.

    Attributes:
      name: of the tensor.
      leaf: path of the parameter.
      at: for each of the parameter's first axes an index, or None for the whole axis, which the
        layout goes over as it does over the axes beyond.
      layout: of the part.
    """

    name: str
    leaf: str
    at: tuple[int | None, ...]
    layout: Layout

    def part(self, shape: Sequence[int]) -> Region:
        """The region of the parameter [shape] that the tensor fills."""
        return tuple(
            slice(0, size) if index is None else slice(index, index + 1)
            for index, size in zip(self._indices(shape), shape, strict=True)
        )

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the part, without the axes that are indexed."""
        indices = self._indices(shape)
        return tuple(size for index, size in zip(indices, shape, strict=True) if index is None)

    def without_indices(self, region: Region) -> Region:
        """A region of the parameter as one of the part."""
        indices = self._indices(region)
        return tuple(s for index, s in zip(indices, region, strict=True) if index is None)

    def with_indices(self, region: Region, parameter: Region) -> Region:
        """The inverse of `without_indices`, for a smaller region than `parameter`."""
        left = iter(region)
        indices = self._indices(parameter)
        return tuple(
            next(left) if index is None else s for index, s in zip(indices, parameter, strict=True)
        )

    def _indices(self, axes: Sequence[Any]) -> tuple[int | None, ...]:
        """One for each of the parameter's axes."""
        return (*self.at, *(None,) * (len(axes) - len(self.at)))


def of_model(rows: Sequence[TensorRow]) -> list[Tensor]:
    """The tensors outside of blocks."""
    return [_tensor(row, row.ours, (), row.theirs, 0) for row in rows]


def of_blocks(
    config: StackConfig,
    ours: str,
    theirs: str,
    every: Sequence[TensorRow],
    dense: Sequence[TensorRow],
    sparse: Sequence[TensorRow],
) -> list[Tensor]:
    """The tensors of a stack's blocks, whose parameters are stacked over a period's repetitions.

    Args:
      config: the stack.
      ours: its path, such as `stack`.
      theirs: what names of its tensors begin with, such as `model.layers.{layer}.`.
      every, dense, sparse: rows of all blocks, of those without and of those with a MoE.
    """
    tensors = []
    for i, stage in enumerate(config.stages):
        period = len(stage.experts)
        for place in range(period * stage.count):
            repeat, j = divmod(place, period)
            num_experts = stage.experts[j]
            prefix = theirs.format(layer=stage.first + place)
            for row in (*every, *(sparse if num_experts else dense)):
                tensors += [
                    _tensor(
                        row,
                        f"{ours}/stages/{i}/blocks/{j}/{row.ours}",
                        (repeat,),
                        prefix + row.theirs,
                        expert,
                    )
                    for expert in range(num_experts if "{expert}" in row.theirs else 1)
                ]
    return tensors


def _tensor(row: TensorRow, path: str, at: tuple[int, ...], name: str, expert: int) -> Tensor:
    leaf, _, part = path.format(expert=expert).rstrip("]").partition("[")
    indices = [None if index.strip() == ":" else int(index) for index in part.split(",") if index]
    layout = Layout.parse(row.layout, row.interleaved)
    return Tensor(name.format(expert=expert), leaf, (*at, *indices), layout)
