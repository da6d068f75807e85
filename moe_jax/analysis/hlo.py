"""What a compiled XLA program does, read from `compiled.as_text()`.

Collectives and matrix products with how often each runs in one call of the program: XLA's own cost
analysis counts the body of a loop once, whatever its length. Works on the text of every backend; the
forms that it knows are those that XLA printed for CPU and TPU in jaxlib 0.10 to 0.12.

https://openxla.org/xla/operation_semantics names the operations.
"""

import collections
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
# Their time and their bytes are those of the instructions inside.
CONTAINERS = ("while", "conditional", "call")

Groups = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Array:
    """Attributes: dtype: XLA's name, such as bf16; dims: on one device."""

    dtype: str
    dims: tuple[int, ...]

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
    """One line of the text.

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
    """

    name: str
    instruction: str
    pieces: tuple[Piece, ...]
    groups: Groups
    trips: Trips

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


class Program:
    """A compiled program.

    Attributes:
      module: its name, such as jit_step.
    """

    def __init__(self, text: str) -> None:
        """Parses `compiled.as_text()`.

        Raises:
          ValueError: there is no entry computation.
        """
        self._computations: dict[str, dict[str, Instruction]] = {}
        self._callers: dict[str, list[tuple[str, Instruction]]] = collections.defaultdict(list)
        self._entry = ""
        header = text.split("\n", 1)[0]
        self.module = header.removeprefix("HloModule ").split(",")[0]
        counts = re.findall(r"(?:num_partitions|replica_count)=(\d+)", header)
        self._devices = math.prod(int(count) for count in counts)
        self._parse(text)
        if not self._entry:
            raise ValueError("the text has no ENTRY computation; give compiled.as_text().")
        for computation, instructions in self._computations.items():
            for instruction in instructions.values():
                for callee in _called(instruction):
                    self._callers[callee].append((computation, instruction))

    def collectives(self) -> list[Collective]:
        """Every collective between at least two devices, in the order of the text."""
        return [
            found
            for computation, instruction in self._running()
            if (found := self._collective(computation, instruction)) and found.group_size > 1
        ]

    def matrix_products(self) -> list[MatrixProduct]:
        """Every dot and convolution, also within fusions, and cuBLAS calls on GPUs.

        Other custom calls (Pallas kernels) are opaque and left out.
        """
        return [
            MatrixProduct(self.op_name(instruction.name), flops, self.trips(computation))
            for computation, instruction in self._running()
            if (flops := self._flops(computation, instruction))
        ]

    def op_name(self, instruction: str) -> str:
        """Where an instruction comes from: its own metadata, or else that of what it works for.

        XLA drops the metadata of some instructions that it rewrites, such as products whose batch
        dimension has size 1. A consumer then stands for them, or else an operand, or else the
        caller; a neighbour that computes goes before one that only moves data.
        """
        return self._op_names.get(instruction, "")

    def knows(self, instruction: str) -> bool:
        """Whether there is an instruction of this name."""
        return instruction in self._op_names

    def is_container(self, instruction: str) -> bool:
        """Whether it only runs other instructions: a loop, a conditional or a call."""
        return instruction in self._containers

    def trips(self, computation: str) -> Trips:
        """How often a computation runs."""
        return self._trips.get(computation, Trips(0, True))

    def _parse(self, text: str) -> None:
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if header := _COMPUTATION.match(line):
                current = self._computations.setdefault(header["name"], {})
                if header["entry"]:
                    self._entry = header["name"]
            elif instruction := _instruction(line):
                current[instruction.name] = instruction

    def _running(self) -> Iterator[tuple[str, Instruction]]:
        for computation, instructions in self._computations.items():
            if self.trips(computation).count:
                for instruction in instructions.values():
                    yield computation, instruction

    @functools.cached_property
    def _trips(self) -> dict[str, Trips]:
        """Of each computation that the entry reaches: summed over its callers."""
        found = {self._entry: Trips(1, True)}

        def of(computation: str) -> Trips:
            if computation not in found:
                total = Trips(0, True)
                for caller, instruction in self._callers[computation]:
                    around, inside = of(caller), self._trips_of_call(caller, instruction)
                    total = Trips(
                        total.count + around.count * inside.count,
                        total.exact and around.exact and inside.exact,
                    )
                found[computation] = total
            return found[computation]

        for computation in self._computations:
            of(computation)
        return found

    def _trips_of_call(self, computation: str, caller: Instruction) -> Trips:
        if caller.opcode == "conditional":
            return Trips(1, exact=False)
        if caller.opcode != "while":
            return Trips(1, exact=True)
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', caller.attributes)
        count = int(known[1]) if known else self._counted_trips(computation, caller)
        return Trips(1, exact=False) if count is None else Trips(count, exact=True)

    def _counted_trips(self, computation: str, loop: Instruction) -> int | None:
        """Trips of a loop over i = start; i < stop; i += step, all constants; None for others.

        The TPU compiler leaves no other trace of them.
        """
        (condition,) = _references("condition", loop.attributes)
        (body,) = _references("body", loop.attributes)
        test, renewed = self._root(condition), self._root(body)
        initial = self._source(computation, loop.operands[0])
        if test is None or test.opcode != "compare" or "direction=LT" not in test.attributes:
            return None
        index = _tuple_index(self._source(condition, test.operands[0]))
        if index is None or initial is None or renewed is None:
            return None
        if initial.opcode != "tuple" or renewed.opcode != "tuple":
            return None
        start = _integer(self._source(computation, initial.operands[index]))
        stop = _integer(self._source(condition, test.operands[1]))
        add = self._source(body, renewed.operands[index])
        if start is None or stop is None or add is None or add.opcode != "add":
            return None
        terms = [self._source(body, operand) for operand in add.operands]
        steps = [step for step in map(_integer, terms) if step is not None and step > 0]
        if len(steps) != 1 or index not in map(_tuple_index, terms):
            return None
        return max(-(-(stop - start) // steps[0]), 0)

    def _root(self, computation: str) -> Instruction | None:
        instructions = self._computations.get(computation, {})
        return next((i for i in instructions.values() if i.is_root), None)

    def _source(self, computation: str, name: str) -> Instruction | None:
        """The instruction of this name, or what it is a copy of."""
        instruction = self._computations[computation].get(name)
        while instruction is not None and instruction.opcode == "copy":
            instruction = self._computations[computation].get(instruction.operands[0])
        return instruction

    @functools.cached_property
    def _containers(self) -> set[str]:
        every = itertools.chain.from_iterable(c.values() for c in self._computations.values())
        return {instruction.name for instruction in every if instruction.opcode in CONTAINERS}

    @functools.cached_property
    def _op_names(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for computation in reversed(self._computations):  # Callers stand after what they call.
            called_by = (found.get(caller.name, "") for _, caller in self._callers[computation])
            found |= _completed_op_names(
                self._computations[computation], next(filter(None, called_by), "")
            )
        return found

    def _collective(self, computation: str, instruction: Instruction) -> Collective | None:
        name = instruction.opcode.removesuffix("-start")
        if name not in COLLECTIVES:
            return None
        shape = instruction.shape
        if name != instruction.opcode and name != "all-reduce" and isinstance(shape, tuple):
            shape = shape[1]  # (operands, results, contexts of the transfer)
        arrays = list(_arrays(shape))
        op_names = _separate(self.op_name(instruction.name), len(arrays))
        return Collective(
            name,
            instruction.name,
            tuple(Piece(*pair) for pair in zip(op_names, arrays, strict=True)),
            communicating_groups(instruction.attributes, self._devices),
            self.trips(computation),
        )

    def _flops(self, computation: str, instruction: Instruction) -> int:
        """Of one run; 0 for what is no matrix product."""
        opcode = instruction.opcode
        cublas = opcode == "custom-call" and "__cublas$" in instruction.attributes
        if opcode not in ("dot", "convolution") and not cublas:
            return 0
        operands = (self._computations[computation][name].shape for name in instruction.operands)
        left, right = itertools.islice(itertools.chain.from_iterable(map(_arrays, operands)), 2)
        result = next(_arrays(instruction.shape))
        if opcode == "convolution":
            return _convolution_flops(left, right, result, instruction.attributes)
        contracted = re.search(
            r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)', instruction.attributes
        )
        dims = re.findall(r"\d+", contracted[1]) if contracted else []
        return 2 * result.elements * math.prod(left.dims[int(dim)] for dim in dims)


_COMPUTATION = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) (?:\(.*\) -> .*)?\{$")
_DEFINITION = re.compile(r"\s+(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = ")
_OPCODE = re.compile(r"\s*(?P<opcode>[a-z][\w\-]*)\(")
_ARRAY = re.compile(r"(?P<dtype>[a-z]\w*)\[(?P<dims>[^\]]*)\](?:\{[^}]*\})?")
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
# What stands at the borders between parts of a program.
_MOVES = ("/all_to_all", "/all_gather", "/dynamic_slice", "/dynamic_update_slice")
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
        dims = re.findall(r"\d+", array["dims"])  # A dynamic one is written <=8.
        return Array(array["dtype"], tuple(int(dim) for dim in dims)), array.end()
    parts: list[Shape] = []
    at += 1
    while text[at] != ")":
        if text[at] in ", ":
            at += 1
        else:
            part, at = _shape(text, at)
            parts.append(part)
    return tuple(parts), at + 1


def _arrays(shape: Shape) -> Iterator[Array]:
    if isinstance(shape, Array):
        yield shape
    else:
        for part in shape:
            yield from _arrays(part)


def _closing(text: str, at: int) -> int:
    """Position of the parenthesis that closes the one before `at`."""
    depth = 1
    for match in re.compile(r"[()]").finditer(text, at):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.start()
    return len(text)


def _references(attribute: str, attributes: str) -> list[str]:
    found = re.search(rf"\b{attribute}=(?:\{{([^}}]*)\}}|(%?[\w.\-]+))", attributes)
    return re.findall(r"[\w.\-]+", found[1] or found[2]) if found else []


def _called(instruction: Instruction) -> Iterator[str]:
    """Computations that it runs; the later halves of an asynchronous pair run nothing."""
    if instruction.opcode in ("async-update", "async-done"):
        return
    attributes = instruction.attributes.split(", metadata=")[0]
    for attribute in _CALLS:
        yield from _references(attribute, attributes)


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


def _completed_op_names(instructions: dict[str, Instruction], caller: str) -> dict[str, str]:
    """op_names of one computation, those that are missing filled in from around them."""
    names = {name: instruction.op_name for name, instruction in instructions.items()}
    consumers: dict[str, list[str]] = collections.defaultdict(list)
    for name, instruction in instructions.items():
        for operand in instruction.operands:
            consumers[operand].append(name)
    # Backwards for what consumers know, then forwards for what only operands know.
    for name in (*reversed(instructions), *instructions):
        around = [*consumers[name], *instructions[name].operands]
        known = [op_name for other in around if (op_name := names.get(other))]
        computing = [op_name for op_name in known if not op_name.endswith(_MOVES)]
        names[name] = names[name] or next(iter(computing + known), "")
    return {name: op_name or caller for name, op_name in names.items()}


def _separate(op_name: str, count: int) -> list[str]:
    """The op_names of the `count` results that XLA combined under one: prefix/(first:second)."""
    start, depth = len(op_name), 0
    for start in reversed(range(len(op_name))):
        depth += {")": 1, "(": -1}.get(op_name[start], 0)
        if not depth:
            break
    if not op_name.endswith(")") or op_name[max(start - 1, 0)] not in "/(":
        return [op_name] * count
    alternatives = [""]
    for letter in op_name[start + 1 : -1]:
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if letter == ":" and not depth:
            alternatives.append("")
        else:
            alternatives[-1] += letter
    if len(alternatives) != count:
        return [op_name] * count
    return [op_name[:start] + alternative for alternative in alternatives]


def communicating_groups(attributes: str, devices: int) -> Groups:
    """Partition ids that talk to each other, in each way that XLA's versions write them.

    Args:
      attributes: of a collective, such as `replica_groups=[2,4]<=[8]`.
      devices: of the program; all of them talk where the groups are empty.

    Raises:
      ValueError: it has no groups, or they are written in an unknown way.
    """
    if pairs := re.search(r"source_target_pairs=\{(?:\{\d+,\d+\},?)*\}", attributes):
        return _connected((int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)", pairs[0]))
    found = re.search(
        r"replica_groups=(?:(?P<listed>\{(?:\{[\d,]*\},?)*\})|(?P<iota>\[[\d,]+\]<=[\[\]\d,T()]+)|"
        r"mesh\[(?P<mesh>[^\]]*)\](?:, device_ids=\((?P<ids>.*?)\))? \{(?P<axes>[^}]*)\})",
        attributes,
    )
    if not found:
        raise ValueError(f"replica groups in an unknown notation: {attributes[:200]!r}")
    if found["mesh"]:
        return _groups_of_mesh(found["mesh"], found["ids"], found["axes"])
    if found["iota"]:
        dims, order = found["iota"].split("<=")
        return _rows(_iota(order).reshape(_integers(dims)))
    groups = tuple(
        tuple(_integers(group)) for group in re.findall(r"\{([\d,]+)\}", found["listed"])
    )
    return groups or (tuple(range(devices)),)


def _groups_of_mesh(mesh: str, ids: str | None, axes: str) -> Groups:
    """Of 'a'=2,'b'=4 with the axes that talk, 'b' or a part of one: 'b':(pre)size.

    An axis of size n is thought of as [pre, size, n / (pre * size)]. Device ids that are not in order
    are written [2,4]T(1,0) or as a list.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    talking = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)
    cuts = {name: {1, size} for name, size in sizes.items()}
    spans = []
    for name, before, size in talking:
        first = int(before or 1)
        spans.append((name, first, first * int(size or sizes[name])))
        cuts[name] |= set(spans[-1][1:])
    pieces = [
        (name, start, stop)
        for name in sizes
        for start, stop in itertools.pairwise(sorted(cuts[name]))
    ]
    order = f"[{math.prod(sizes.values())}]" if ids is None else ids
    grid = (_iota(order) if order.startswith("[") else np.array(_integers(order))).reshape(
        [stop // start for _, start, stop in pieces]
    )
    chosen = [
        position
        for name, first, last in spans
        for position, (axis, start, stop) in enumerate(pieces)
        if axis == name and first <= start and stop <= last
    ]
    size = math.prod(grid.shape[position] for position in chosen)
    return _rows(np.moveaxis(grid, chosen, range(-len(chosen), 0)).reshape(-1, size))


def _iota(text: str) -> np.ndarray:
    """[8] or [2,4]T(1,0): counting up in that shape, transposed, flattened."""
    dims, _, permutation = text.partition("T")
    shape = _integers(dims)
    counted = np.arange(math.prod(shape)).reshape(shape)
    return counted.transpose(_integers(permutation) or None).ravel()


def _integers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _rows(groups: np.ndarray) -> Groups:
    return tuple(tuple(int(device) for device in group) for group in groups)


def _connected(pairs: Iterable[tuple[int, int]]) -> Groups:
    """Sets of devices that are linked by (source, target) pairs."""
    groups: dict[int, set[int]] = {}
    for pair in pairs:
        merged = set(pair).union(*(groups.get(device, set()) for device in pair))
        groups.update(dict.fromkeys(merged, merged))
    return tuple(sorted({tuple(sorted(group)) for group in groups.values()}))


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
