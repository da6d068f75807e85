"""How long a step takes at least, from what the program does and what the machine can do.

Four resources work side by side: the matrix units, main memory (HBM), the links within a slice (ICI;
NVLink within a host) and the network between slices (DCN). If everything overlaps, the step takes as long
as the busiest of them; if nothing does, as long as all one after the other.

Collectives are modelled as https://jax-ml.github.io/scaling-book/sharding does: they fill the links of all
dimensions of the torus that a group spans, in both directions, and latency counts nothing. Along one
dimension a group of n chips, s apart, has
  2 * link / s  bytes/s where it closes a ring (s groups take turns on the same links)
  link / s      bytes/s where it is a line: part of a dimension, or of one without wrap-around
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh

from moe_jax.analysis.hlo import Collective
from moe_jax.analysis.hlo.groups import Groups
from moe_jax.pods.hardware import Topology

Place = tuple[int, tuple[int, ...]]  # A slice, and the coordinates of a chip in it.


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of one step if one resource were all that mattered.

    Attributes:
      compute: matrix products at the peak rate.
      memory: traffic of main memory at its full bandwidth.
      interconnect: collectives within a slice, or within a host of GPUs.
      network: collectives between slices, or hosts of GPUs.
    """

    compute: float
    memory: float
    interconnect: float
    network: float

    @property
    def seconds(self) -> float:
        """Of a step in which everything overlaps."""
        return max(dataclasses.astuple(self))

    @property
    def sum(self) -> float:
        """Seconds of a step in which nothing overlaps."""
        return sum(dataclasses.astuple(self))

    @property
    def binding(self) -> str:
        """Name of the resource that takes longest."""
        terms = dataclasses.asdict(self)
        return max(terms, key=lambda name: terms[name])


def roofline(
    flops: float,
    memory_bytes: float,
    collectives: Sequence[Collective],
    mesh: Mesh,
    topology: Topology,
) -> Roofline:
    """The roofline of one step.

    Args:
      flops: of matrix products and kernels on one device.
      memory_bytes: read and written in main memory by one device.
      collectives: of the program, each with how often it runs.
      mesh: of the devices that the program was compiled for.
      topology: of the same devices.
    """
    interconnect = network = 0.0
    for collective in collectives:
        within, between = collective_seconds(collective, mesh, topology)
        interconnect += collective.trips.count * within
        network += collective.trips.count * between
    return Roofline(
        flops / topology.chip.matrix_flops,
        memory_bytes / topology.chip.hbm_bandwidth,
        interconnect,
        network,
    )


def collective_seconds(
    collective: Collective, mesh: Mesh, topology: Topology
) -> tuple[float, float]:
    """Seconds of one run of a collective: (within slices, between slices), of its slowest group.

    A gather of n parts brings each chip all but its own; a reduction is the same backwards, and one
    whose result all devices get is both. In an exchange of all with all over n chips in a row, half
    of what one half holds goes to the other half: n / 4 times what a device holds, over the
    bandwidth of the row. Over several slices the parts first go to one device of each other slice,
    every device fetching an equal share.

    A ragged exchange sends no more rows than the smaller of its operand and its result can hold;
    how many it sends is known only when it runs. A permutation is taken to go over one link. What
    the two devices of one chip exchange is free, but they share its links.
    """
    spans = _spans(collective.groups, mesh, topology)
    times = [_seconds(collective, span, topology) for span in spans]
    return max(within for within, _ in times), max(between for _, between in times)


@dataclasses.dataclass(frozen=True)
class _Row:
    """The chips of a group along one dimension of the torus, or under one switch.

    Attributes:
      bandwidth: bytes/s that a chip can receive, while it sends as many.
      load: bytes through its links in an exchange of all with all, relative to what it holds.
    """

    bandwidth: float
    load: float


@dataclasses.dataclass(frozen=True)
class _Span:
    """How the devices of a group lie.

    Attributes:
      slices: over how many they are spread.
      devices: in one slice.
      chips: in one slice.
      rows: along each dimension in which the chips of a slice differ.
    """

    slices: int
    devices: int
    chips: int
    rows: tuple[_Row, ...]


def _seconds(collective: Collective, span: _Span, topology: Topology) -> tuple[float, float]:
    chip = topology.chip
    name, held = collective.name, collective.bytes
    if name in ("all-to-all", "ragged-all-to-all"):
        held = min(held, collective.operand_bytes)
        staying = held * chip.devices / span.slices
        within = max((staying * row.load / row.bandwidth for row in span.rows), default=0)
        return within, held * (1 - 1 / span.slices) / chip.dcn_bandwidth
    if name == "collective-permute":
        within = held * chip.devices / chip.link_bandwidth if span.chips > 1 else 0
        return within, held / chip.dcn_bandwidth if span.slices > 1 else 0
    if name == "reduce-scatter":
        held = collective.operand_bytes
    passes = 2 if name == "all-reduce" else 1
    # Devices of a chip that are in other groups want their bytes over the same links.
    sharing = chip.devices * span.chips / span.devices
    received = passes * held * sharing * (1 - 1 / span.chips)
    within = received / sum(row.bandwidth for row in span.rows) if span.rows else 0
    between = passes * held * (1 - 1 / span.slices) / span.devices
    return within, between / chip.dcn_bandwidth


@functools.cache
def _spans(groups: Groups, mesh: Mesh, topology: Topology) -> frozenset[_Span]:
    """Of all groups of a collective; most collectives of a program have the same groups."""
    places = [_place(device, topology) for device in mesh.devices.flat]
    return frozenset(_span([places[position] for position in group], topology) for group in groups)


def _span(places: Sequence[Place], topology: Topology) -> _Span:
    """Of one group, whose parts in different slices lie alike."""
    slices = {place[0] for place in places}
    first = [place for place in places if place[0] == places[0][0]]
    chips = {coordinates for _, coordinates in first}
    rows = []
    for dimension, positions in enumerate(zip(*chips, strict=True)):
        count = len(set(positions))
        if count == 1:
            continue
        if topology.chip.gpu:
            rows.append(_Row(topology.chip.link_bandwidth, 1 - 1 / count))
            continue
        apart = math.gcd(*(position - min(positions) for position in positions))
        closed = topology.wraps[dimension] and count * apart == topology.shape[dimension]
        link = topology.chip.link_bandwidth / apart
        rows.append(_Row(2 * link if closed else link, count / 4))
    return _Span(len(slices), len(first), len(chips), tuple(rows))


def _place(device: Any, topology: Topology) -> Place:
    """Where a device is; for GPUs, whose ids go through one host after the other, host and place in it."""
    if topology.chip.gpu:
        host, position = divmod(device.id, topology.shape[-1])
        return host, (position,)
    return getattr(device, "slice_index", 0), tuple(device.coords)
