"""Which devices talk to each other in a collective, in each notation of XLA's versions."""

import itertools
import math
import re
from collections.abc import Iterable

import numpy as np

Groups = tuple[tuple[int, ...], ...]


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


def groups_between_slices(attributes: str, devices: int) -> Groups:
    """Partition ids that exchange something through the hosts of TPU slices.

    Each device talks to those that have its place in the other slices. Partitions are taken to be in
    the order of slices, as `moe_jax.parallel.mesh.mesh_of` lays them. The text of a program for several
    slices is that of one slice: its number of partitions, and the groups within slices, are.

    Args:
      attributes: with `_xla_megascale_target="{1,2}x{0:3}"`: slices, and devices of each.
      devices: of the program's text, those of one slice.

    Raises:
      ValueError: the slices are not named, or not all devices of a slice.
    """
    target = re.search(r'_xla_megascale_target="\{([\d,:]+)\}x\{([\d,:]+)\}"', attributes)
    if not target or _counted(target[2]) != devices:
        raise ValueError(f"a transfer between slices in an unknown notation: {attributes[:200]!r}")
    slices = _counted(target[1])
    return _rows(np.arange(slices * devices).reshape(slices, devices).T)


def _counted(ranges: str) -> int:
    """Of 1,4:6 there are 4."""
    pairs = (part.partition(":") for part in ranges.split(","))
    return sum(int(last or first) - int(first) + 1 for first, _, last in pairs)


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
