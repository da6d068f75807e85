"""The text of a program: its computations, their instructions and the shapes of these."""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator

# Their time and their bytes are those of the instructions inside.
CONTAINERS = ("while", "conditional", "call")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array on one device.

    Attributes:
      dtype: XLA's name, such as bf16.
      dims: on one device.
      in_main_memory: it lies in the device's main memory (HBM), which is memory space 0; not in a
        TPU core's VMEM (1), in the CMEM of a v4 (3) or with the host (5).
    """

    dtype: str
    dims: tuple[int, ...]
    in_main_memory: bool = True

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Size; types of less than a byte are packed."""
        if self.dtype in ("token", "opaque"):
            return 0
        found = re.match(r"[a-z]+(\d+)", self.dtype)  # f8e4m3fn has 8 bits; pred takes a byte.
        return -(-self.elements * (int(found[1]) if found else 8) // 8)


Shape = Array | tuple["Shape", ...]


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of the text.

    Attributes:
      name: unique in the program.
      opcode: such as `dot` or `all-gather-start`.
      shape: of the result.
      operands: names; of a constant, its literal.
      attributes: the rest of the line.
      op_name: where the program's author put it (name scopes and primitive), with the transformations
        that it went through; empty where XLA kept none.
      is_root: its result is the computation's.
    """

    name: str
    opcode: str
    shape: Shape
    operands: tuple[str, ...]
    attributes: str
    op_name: str
    is_root: bool


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Module:
    """A program as it is written.

    Attributes:
      name: such as jit_step.
      devices: that run it.
      entry: name of the computation that a call of the program runs.
      computations: by name, in the order of the text: callers stand after what they call.
    """

    name: str
    devices: int
    entry: str
    computations: dict[str, Computation]

    @functools.cached_property
    def callers(self) -> dict[str, list[tuple[str, Instruction]]]:
        """Computation -> (computation, instruction) of all who run it."""
        callers: dict[str, list[tuple[str, Instruction]]] = collections.defaultdict(list)
        for computation, instructions in self.computations.items():
            for instruction in instructions.values():
                for callee in called_by(instruction):
                    callers[callee].append((computation, instruction))
        return callers


def parse(text: str) -> Module:
    """Reads `compiled.as_text()`.

    Raises:
      ValueError: there is no entry computation.
    """
    header = text.split("\n", 1)[0]
    counts = re.findall(r"(?:num_partitions|replica_count)=(\d+)", header)
    entry = ""
    computations: dict[str, Computation] = {}
    current: Computation = {}
    # The metadata of some kernels has line breaks inside.
    for line in re.sub(r'\n(?=["}].)', "", text).splitlines():
        if found := _COMPUTATION.match(line):
            current = computations.setdefault(found["name"], {})
            if found["entry"]:
                entry = found["name"]
        elif instruction := _instruction(line):
            current[instruction.name] = instruction
    if not entry:
        raise ValueError("the text has no ENTRY computation; give compiled.as_text().")
    name = header.removeprefix("HloModule ").split(",")[0]
    return Module(name, math.prod(int(count) for count in counts), entry, computations)


def arrays_of(shape: Shape) -> Iterator[Array]:
    """The arrays of a tuple, of tuples in it too."""
    if isinstance(shape, Array):
        yield shape
    else:
        for part in shape:
            yield from arrays_of(part)


def known_operands(computation: Computation, instruction: Instruction) -> list[str]:
    """Names of the operands that the text has: not the numbers of parameters, nor literals."""
    return [name for name in instruction.operands if name in computation]


def operand_shapes(computation: Computation, instruction: Instruction) -> list[Shape]:
    """Shapes of an instruction's operands."""
    return [computation[name].shape for name in known_operands(computation, instruction)]


def delivered(instruction: Instruction) -> Shape:
    """The shape of what an instruction computes.

    The first half of an asynchronous pair has besides it its operands and what the transfer needs.
    """
    shape = instruction.shape
    if not isinstance(shape, tuple) or not instruction.opcode.endswith("-start"):
        return shape
    if instruction.opcode == "all-reduce-start":
        return shape
    return shape[0 if instruction.opcode == "copy-start" else 1]


def references(attribute: str, attributes: str) -> list[str]:
    """The names in an attribute: condition=%a or branch_computations={%a, %b}."""
    found = re.search(rf"\b{attribute}=(?:\{{([^}}]*)\}}|(%?[\w.\-]+))", attributes)
    return re.findall(r"[\w.\-]+", found[1] or found[2]) if found else []


def called_by(instruction: Instruction) -> Iterator[str]:
    """Computations that it runs; the later halves of an asynchronous pair run nothing."""
    if instruction.opcode in ("async-update", "async-done"):
        return
    attributes = instruction.attributes.split(", metadata=")[0]
    for attribute in _CALLS:
        yield from references(attribute, attributes)


def root_of(computation: Computation) -> Instruction | None:
    """The instruction whose result is the computation's."""
    return next((i for i in computation.values() if i.is_root), None)


_COMPUTATION = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) (?:\(.*\) -> .*)?\{$")
_DEFINITION = re.compile(r"\s+(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = ")
_OPCODE = re.compile(r"\s*(?P<opcode>[a-z][\w\-]*)\(")
_ARRAY = re.compile(r"(?P<dtype>[a-z]\w*)\[(?P<dims>[^\]]*)\](?:\{(?P<layout>[^}]*)\})?")
_ELSEWHERE = re.compile(r"S\([1-9]\d*\)")
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_CALLS = (
    "body", "condition", "calls", "to_apply", "branch_computations", "true_computation",
    "false_computation", "called_computations",
)  # fmt: skip


def _instruction(line: str) -> Instruction | None:
    definition = _DEFINITION.match(line)
    if not definition:
        return None
    line = re.sub(r"/\*.*?\*/", "", line)  # /*index=5*/ in long tuples.
    shape, at = _shape(line, definition.end())
    opcode = _OPCODE.match(line, at)
    if not opcode:
        return None
    end = _closing(line, opcode.end())
    inside, attributes = line[opcode.end() : end], line[end + 1 :]
    literal = opcode["opcode"] == "constant"
    op_name = _OP_NAME.search(attributes)
    return Instruction(
        definition["name"],
        opcode["opcode"],
        shape,
        (inside,) if literal else tuple(re.findall(r"%?([\w.\-]+)(?=,|$)", inside)),
        attributes,
        op_name[1] if op_name else "",
        bool(definition["root"]),
    )


def _shape(text: str, at: int) -> tuple[Shape, int]:
    """Reads the shape that starts at `at`: it and where it ends."""
    if text[at] != "(":
        array = _ARRAY.match(text, at)
        if not array:
            raise ValueError(f"no shape of XLA's: {text[at : at + 60]!r}")
        dims = tuple(map(int, re.findall(r"\d+", array["dims"])))  # A dynamic one is written <=8.
        elsewhere = _ELSEWHERE.search(array["layout"] or "")
        return Array(array["dtype"], dims, not elsewhere), array.end()
    parts: list[Shape] = []
    at += 1
    while text[at] != ")":
        if text[at] in ", ":
            at += 1
        else:
            part, at = _shape(text, at)
            parts.append(part)
    return tuple(parts), at + 1


def _closing(text: str, at: int) -> int:
    """Position of the parenthesis that closes the one before `at`."""
    depth = 1
    for match in re.compile(r"[()]").finditer(text, at):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.start()
    return len(text)
