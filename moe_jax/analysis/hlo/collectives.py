"""Collective operations: what they deliver, and among whom."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from moe_jax.analysis.hlo.groups import Groups, communicating_groups, groups_between_slices
from moe_jax.analysis.hlo.op_names import separate
from moe_jax.analysis.hlo.text import Array, Instruction, Shape, arrays_of, delivered
from moe_jax.analysis.hlo.trips import Trips

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
# Between TPU slices libtpu sends through the hosts: a `send` and a `recv` that name what they are for.
_BETWEEN_SLICES = {
    "ALL_GATHER": "all-gather",
    "ALL_REDUCE": "all-reduce",
    "ALL_TO_ALL": "all-to-all",
    "ONE_TO_ONE": "collective-permute",
    "REDUCE_SCATTER": "reduce-scatter",
}
_TRANSFER_TYPE = re.compile(r'_xla_megascale_transfer_type="(\w+)"')


@dataclasses.dataclass(frozen=True)
class Piece:
    """An array that a collective delivers.

    Attributes:
      op_name: of what it is the result.
      array: on one device.
    """

    op_name: str
    array: Array


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation among several devices.

    Attributes:
      name: one of COLLECTIVES; of an asynchronous pair, too.
      instruction: its name in the program.
      pieces: its results on one device; several where XLA combined several collectives into one.
      groups: partition ids that talk to each other, which are positions in `mesh.devices.flat`.
      trips: how often it runs.
      operand_bytes: of what one device gives, in one run.
      synchronous: the program waits for it where it starts it, which only programs for GPUs say.
    """

    name: str
    instruction: str
    pieces: tuple[Piece, ...]
    groups: Groups
    trips: Trips
    operand_bytes: int
    synchronous: bool = False

    @property
    def elements(self) -> int:
        """Elements of its results on one device, in one run."""
        return sum(piece.array.elements for piece in self.pieces)

    @property
    def bytes(self) -> int:
        """Bytes of its results on one device, in one run."""
        return sum(piece.array.bytes for piece in self.pieces)

    @property
    def group_size(self) -> int:
        """Number of devices that talk to each other."""
        return max(len(group) for group in self.groups)

    def axes(self, mesh: Mapping[str, int]) -> tuple[str, ...]:
        """The mesh axes along which the devices of a group differ.

        Args:
          mesh: axis name -> size, in the mesh's order (`mesh.shape`).
        """
        coordinates = np.stack(
            np.unravel_index(np.arange(math.prod(mesh.values())), [*mesh.values()])
        )
        differ = np.zeros(len(mesh), bool)
        for group in self.groups:
            differ |= np.ptp(coordinates[:, list(group)], axis=1) > 0
        return tuple(name for name, varies in zip(mesh, differ, strict=True) if varies)


def collective_of(
    instruction: Instruction, operands: Sequence[Shape], op_name: str, devices: int, trips: Trips
) -> Collective | None:
    """Reads a collective; None for every other instruction and for the second half of a pair.

    Args:
      instruction: any.
      operands: their shapes.
      op_name: see `Instruction`.
      devices: of the program.
      trips: how often it runs.

    Raises:
      ValueError: its groups, or what a transfer between slices is for, are in an unknown notation.
    """
    name = instruction.opcode.removesuffix("-start")
    if name == "recv" and (transfer := _TRANSFER_TYPE.search(instruction.attributes)):
        if transfer[1] not in _BETWEEN_SLICES:
            raise ValueError(f"a transfer between slices of an unknown type: {transfer[1]!r}")
        return _between_slices(_BETWEEN_SLICES[transfer[1]], instruction, op_name, devices, trips)
    if name not in COLLECTIVES:
        return None
    arrays = list(arrays_of(delivered(instruction)))
    op_names = separate(op_name, len(arrays))
    if name == "ragged-all-to-all":
        operands = operands[:1]  # The others are what it writes into, and offsets and sizes.
    return Collective(
        name,
        instruction.name,
        tuple(Piece(*pair) for pair in zip(op_names, arrays, strict=True)),
        communicating_groups(instruction.attributes, devices),
        trips,
        sum(array.bytes for shape in operands for array in arrays_of(shape)),
        re.search(r'"is_sync":\s*true', instruction.attributes) is not None,
    )


def _between_slices(
    name: str, instruction: Instruction, op_name: str, devices: int, trips: Trips
) -> Collective:
    """Of a `recv` from the hosts of other slices; the `send` that belongs to it is not looked at."""
    received = next(arrays_of(instruction.shape))
    groups = groups_between_slices(instruction.attributes, devices)
    given = received.bytes
    if name == "all-gather":
        given //= len(groups[0])
    elif name == "reduce-scatter":
        given *= len(groups[0])
    piece = Piece(separate(op_name, 1)[0], received)
    return Collective(name, instruction.name, (piece,), groups, trips, given)
