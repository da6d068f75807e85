"""What a program reads from and writes to main memory, counted at the borders of its fusions.

What is fused passes through registers, so whatever runs (a fusion, or an instruction outside of
fusions) reads its operands and writes its results; what lies in a core's own memory costs nothing. Of an
operand from which a slice or rows are taken, only those count, and of an array that is updated in
place, only the update. Left out are caches, so that on CPUs it is what the cores ask for, and the
padding of arrays to the tiles of a TPU.
"""

import dataclasses
from collections.abc import Mapping

from moe_jax.analysis.hlo.kernels import is_kernel, kernel_of
from moe_jax.analysis.hlo.text import (
    CONTAINERS,
    Computation,
    Instruction,
    Module,
    Shape,
    arrays_of,
    called_by,
    delivered,
    known_operands,
    operand_shapes,
)
from moe_jax.analysis.hlo.trips import Trips

# They run other instructions, some of them on another core.
_CALLS = (*CONTAINERS, "call-start", "async-start")
# They name memory, or wait for what is counted where it starts.
_FREE = (
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "opt-barrier", "after-all",
    "add-dependency", "partition-id", "replica-id", "async-update",
)  # fmt: skip
_FREE_CALLS = ("AllocateBuffer", "ConcatBitcast", "PrepareAsyncCallStart", "PrepareAsyncCallDone")
# The same array in another form.
_VIEWS = ("bitcast", "reshape")
# They take from their first operand what they deliver.
_TAKES = ("dynamic-slice", "slice", "slice-start", "gather")
# Which operand they write into the first one.
_UPDATES = {"dynamic-update-slice": 1, "scatter": -1}


@dataclasses.dataclass(frozen=True)
class TrafficBytes:
    """An amount of memory traffic.

    Attributes:
      count: bytes on one device.
      exact: all the loops have a known length, and no conditional had a choice; see `Trips`.
    """

    count: float
    exact: bool


def memory_bytes(module: Module, trips: Mapping[str, Trips]) -> TrafficBytes:
    """TrafficBytes that one call of a program reads and writes in main memory, on one device.

    Args:
      module: the program.
      trips: how often each computation runs.
    """
    total, exact = 0.0, True
    for name in _running(module, module.entry):
        moved = sum(
            _moved(module, module.computations[name], instruction)
            for instruction in module.computations[name].values()
        )
        total += trips[name].count * moved
        exact &= trips[name].exact or not moved
    return TrafficBytes(total, exact)


def _running(module: Module, computation: str) -> set[str]:
    """Computations that run as such, neither fused nor for each element of a reduction."""
    found = {computation}
    for instruction in module.computations[computation].values():
        if instruction.opcode in _CALLS:
            found = found.union(*(_running(module, name) for name in called_by(instruction)))
    return found


def _moved(module: Module, computation: Computation, instruction: Instruction) -> float:
    """TrafficBytes that one run of an instruction outside of fusions reads and writes."""
    if _is_free(instruction):
        return 0
    operands = operand_shapes(computation, instruction)
    if is_kernel(instruction):
        return kernel_of(instruction, operands, "", Trips(1, exact=True)).bytes
    shares = _shares(module, computation, instruction)
    read = sum(share * _bytes(operand) for share, operand in zip(shares, operands, strict=True))
    return read + _written(module, computation, instruction)


def _is_free(instruction: Instruction) -> bool:
    opcode = instruction.opcode
    return (
        opcode in (*_CALLS, *_FREE)
        or opcode.endswith("-done")
        or any(f'custom_call_target="{name}"' in instruction.attributes for name in _FREE_CALLS)
    )


def _bytes(shape: Shape) -> int:
    return sum(array.bytes for array in arrays_of(shape) if array.in_main_memory)


def _shares(module: Module, computation: Computation, instruction: Instruction) -> list[float]:
    """Of each operand, the share that is read for the whole result; what is updated stays."""
    operands = operand_shapes(computation, instruction)
    shares = [1.0] * len(operands)
    if instruction.opcode == "fusion":
        return _shares_of_parameters(module, instruction)
    if instruction.opcode in _TAKES:
        shares[0] = min(1, _elements(delivered(instruction)) / max(_elements(operands[0]), 1))
    elif instruction.opcode in _UPDATES:
        shares[0] = 0
    return shares


def _shares_of_parameters(module: Module, fusion: Instruction) -> list[float]:
    """The same of a fusion, backwards from what it delivers."""
    fused = _fused(module, fusion)
    updated = {result.name for result in _results(fused) if _is_in_place(fused, result)}
    shares = {name: float(instruction.is_root) for name, instruction in fused.items()}
    for name in reversed(fused):  # What is used stands before its users.
        of_operands = _shares(module, fused, fused[name])
        if fused[name].opcode in _UPDATES and name not in updated:
            of_operands[0] = 1
        for operand, share in zip(known_operands(fused, fused[name]), of_operands, strict=True):
            shares[operand] = min(1, shares[operand] + shares[name] * share)
    parameters = [i for i in fused.values() if i.opcode == "parameter"]
    return [shares[i.name] for i in sorted(parameters, key=lambda i: int(i.operands[0]))]


def _written(module: Module, computation: Computation, instruction: Instruction) -> int:
    """TrafficBytes of the result, or of what changes in an array that is updated."""
    if instruction.opcode == "send":
        return 0  # Its result is its operand.
    if instruction.opcode == "recv":
        return next(arrays_of(instruction.shape)).bytes
    shape = delivered(instruction)
    if not _bytes(shape):
        return 0
    if instruction.opcode in _UPDATES:
        return _updated_bytes(computation, instruction)
    if instruction.opcode != "fusion":
        return _bytes(shape)
    fused = _fused(module, instruction)
    results = _results(fused)
    parts = shape if isinstance(shape, tuple) and len(results) > 1 else (shape,)
    return sum(
        _written_by_fusion(module, fused, result, part)
        for result, part in zip(results, parts, strict=True)
    )


def _written_by_fusion(
    module: Module, fused: Computation, result: Instruction, shape: Shape
) -> int:
    if not _bytes(shape):
        return 0
    if _is_in_place(fused, result):
        return _updated_bytes(fused, result)
    return _written(module, fused, result) if result.opcode == "fusion" else _bytes(shape)


def _updated_bytes(computation: Computation, update: Instruction) -> int:
    """TrafficBytes that an update changes: those of what it writes, at most the whole array."""
    written = computation[update.operands[_UPDATES[update.opcode]]].shape
    sizes = (sum(array.bytes for array in arrays_of(shape)) for shape in (written, update.shape))
    return min(sizes)


def _is_in_place(fused: Computation, result: Instruction) -> bool:
    """Whether it updates an array that the fusion is given."""
    if result.opcode not in _UPDATES:
        return False
    return _source(fused, result.operands[0]).opcode == "parameter"


def _fused(module: Module, fusion: Instruction) -> Computation:
    (name,) = called_by(fusion)
    return module.computations[name]


def _results(fused: Computation) -> list[Instruction]:
    """What computes each array that a fusion delivers."""
    (root,) = (i for i in fused.values() if i.is_root)
    names = root.operands if root.opcode == "tuple" else (root.name,)
    return [_source(fused, name) for name in names]


def _source(computation: Computation, name: str) -> Instruction:
    instruction = computation[name]
    while instruction.opcode in _VIEWS:
        instruction = computation[instruction.operands[0]]
    return instruction


def _elements(shape: Shape) -> int:
    return sum(array.elements for array in arrays_of(shape))
