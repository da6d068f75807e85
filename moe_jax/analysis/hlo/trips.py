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

    The TPU compiler leaves no other trace of them, nor does that for GPUs of loops that it has unrolled.
    """
    outside = _Scope(computation)
    condition, body = (
        _Scope(references(name, loop.attributes)[0]) for name in ("condition", "body")
    )
    test = _of_root(module, condition)
    renewed = _of_root(module, body)
    initial = _source(module, outside, loop.operands[0])
    if test is None or test[1].opcode != "compare" or "direction=LT" not in test[1].attributes:
        return None
    index = _tuple_index(_source(module, test[0], test[1].operands[0]))
    if index is None or initial is None or renewed is None:
        return None
    if initial[1].opcode != "tuple" or renewed[1].opcode != "tuple":
        return None
    start = _integer(_source(module, initial[0], initial[1].operands[index]))
    stop = _integer(_source(module, test[0], test[1].operands[1]))
    step = _step(module, renewed[0], renewed[1].operands[index], index)
    if start is None or stop is None or not step:
        return None
    return max(-(-(stop - start) // step), 0)


@dataclasses.dataclass(frozen=True)
class _Scope:
    """Where a name is looked up.

    Attributes:
      computation: its instructions have names.
      fusion: what runs it, if it is the inside of a fusion.
      outside: where that one is.
    """

    computation: str
    fusion: Instruction | None = None
    outside: "_Scope | None" = None


_Found = tuple[_Scope, Instruction]


def _of_root(module: Module, scope: _Scope) -> _Found | None:
    root = root_of(module.computations.get(scope.computation, {}))
    return None if root is None else _source(module, scope, root.name)


def _source(module: Module, scope: _Scope, name: str) -> _Found | None:
    """The instruction of this name or what it is a copy of, also into fusions and out of them."""
    while instruction := module.computations[scope.computation].get(name):
        if instruction.opcode == "copy":
            name = instruction.operands[0]
        elif instruction.opcode == "parameter" and scope.fusion and scope.outside:
            name = scope.fusion.operands[int(instruction.operands[0])]
            scope = scope.outside
        elif instruction.opcode == "fusion":
            (fused,) = called_by(instruction)
            root = root_of(module.computations[fused])
            if root is None:
                return None
            scope, name = _Scope(fused, instruction, scope), root.name
        else:
            return scope, instruction
    return None


def _step(module: Module, scope: _Scope, name: str, index: int) -> int | None:
    """The number that a loop's body adds to part `index` of its state; None where it does something else."""
    total = 0
    found = _source(module, scope, name)
    while found is not None and found[1].opcode == "add":
        inside, add = found
        terms = [_source(module, inside, operand) for operand in add.operands]
        constants = [number for number in map(_integer, terms) if number is not None]
        others = [term for term in terms if _integer(term) is None]
        if len(constants) != 1:
            return None
        total += constants[0]
        (found,) = others
    return total if _tuple_index(found) == index and total > 0 else None


def _tuple_index(found: _Found | None) -> int | None:
    if found is None or found[1].opcode != "get-tuple-element":
        return None
    index = re.search(r"index=(\d+)", found[1].attributes)
    return int(index[1]) if index else None


def _integer(found: _Found | None) -> int | None:
    """The value of an integer constant."""
    if found is None or found[1].opcode != "constant":
        return None
    (literal,) = found[1].operands
    return int(literal) if re.fullmatch(r"-?\d+", literal) else None
