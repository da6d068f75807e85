"""How often each computation of a program runs: trips of the loops around it."""

import dataclasses
import re

from moe_jax.analysis.hlo.text import Instruction, Module, called_by, references, root_of


@dataclasses.dataclass(frozen=True)
class Trips:
    """How often something runs in one call of the program, on one device.

    Attributes:
      count: trips of all the loops around it, multiplied. A loop of unknown length counts as one
        trip, and a branch of a conditional as taken.
      exact: nothing of the kind was around it.
    """

    count: int
    exact: bool

    @property
    def known(self) -> int | None:
        """The count, or None where it is not exact."""
        return self.count if self.exact else None


def trips_of(module: Module) -> dict[str, Trips]:
    """Of each computation that the entry reaches: summed over its callers."""
    found = {module.entry: Trips(1, True)}

    def of(computation: str) -> Trips:
        if computation not in found:
            total = Trips(0, True)
            for caller, instruction in module.callers[computation]:
                around, inside = of(caller), _trips_of_call(module, caller, instruction)
                total = Trips(
                    total.count + around.count * inside.count,
                    total.exact and around.exact and inside.exact,
                )
            found[computation] = total
        return found[computation]

    for computation in module.computations:
        of(computation)
    return found


def _trips_of_call(module: Module, computation: str, caller: Instruction) -> Trips:
    if caller.opcode == "conditional":
        # What XLA knows to be taken stands alone.
        return Trips(1, exact=len(set(called_by(caller))) == 1)
    if caller.opcode != "while":
        return Trips(1, exact=True)
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', caller.attributes)
    count = int(known[1]) if known else _counted_trips(module, computation, caller)
    return Trips(1, exact=False) if count is None else Trips(count, exact=True)


def _counted_trips(module: Module, computation: str, loop: Instruction) -> int | None:
    """Trips of a loop over i = start; i < stop; i += step, all constants; None for others.

    The TPU compiler leaves no other trace of them.
    """
    (condition,) = references("condition", loop.attributes)
    (body,) = references("body", loop.attributes)
    test = root_of(module.computations.get(condition, {}))
    renewed = root_of(module.computations.get(body, {}))
    initial = _source(module, computation, loop.operands[0])
    if test is None or test.opcode != "compare" or "direction=LT" not in test.attributes:
        return None
    index = _tuple_index(_source(module, condition, test.operands[0]))
    if index is None or initial is None or renewed is None:
        return None
    if initial.opcode != "tuple" or renewed.opcode != "tuple":
        return None
    start = _integer(_source(module, computation, initial.operands[index]))
    stop = _integer(_source(module, condition, test.operands[1]))
    add = _source(module, body, renewed.operands[index])
    if start is None or stop is None or add is None or add.opcode != "add":
        return None
    terms = [_source(module, body, operand) for operand in add.operands]
    steps = [step for step in map(_integer, terms) if step is not None and step > 0]
    if len(steps) != 1 or index not in map(_tuple_index, terms):
        return None
    return max(-(-(stop - start) // steps[0]), 0)


def _source(module: Module, computation: str, name: str) -> Instruction | None:
    """The instruction of this name, or what it is a copy of."""
    instruction = module.computations[computation].get(name)
    while instruction is not None and instruction.opcode == "copy":
        instruction = module.computations[computation].get(instruction.operands[0])
    return instruction


def _tuple_index(instruction: Instruction | None) -> int | None:
    if instruction is None or instruction.opcode != "get-tuple-element":
        return None
    found = re.search(r"index=(\d+)", instruction.attributes)
    return int(found[1]) if found else None


def _integer(instruction: Instruction | None) -> int | None:
    """The value of an integer constant."""
    if instruction is None or instruction.opcode != "constant":
        return None
    (literal,) = instruction.operands
    return int(literal) if re.fullmatch(r"-?\d+", literal) else None
