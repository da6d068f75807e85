"""Rooflines by hand. W is the bandwidth of a link in one direction, V bytes, B bytes of a device."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from jax.sharding import Mesh

from moe_jax.analysis.hlo import Array, Collective, Piece, Trips
from moe_jax.pods.hardware import describe, topology
from moe_jax.pods.roofline import Roofline, collective_seconds, roofline


@dataclasses.dataclass(frozen=True)
class Device:
    """What is read of `jax.Device`."""

    id: int
    coords: tuple[int, ...]
    slice_index: int


def devices_of(machine):
    """Cores of a chip next to each other, then x, y, z, then slices."""
    shape = (*machine.shape, 1)[:3]
    places = [
        (tuple(reversed(coordinates)), slice_index)
        for slice_index in range(machine.slices)
        for coordinates in itertools.product(*map(range, reversed(shape)))
        for _ in range(machine.chip.devices)
    ]
    return [Device(number, *place) for number, place in enumerate(places)]


def seconds(machine, name, groups, result, operand=None):
    """Of one collective on a mesh whose devices are in the machine's order."""
    mesh = Mesh(np.array(devices_of(machine)).reshape(-1, 1, 1), ("data", "expert", "model"))
    return collective_seconds(collective(name, groups, result, operand), mesh, machine)


def collective(name, groups, result, operand=None, trips=1):
    piece = Piece("", Array("s8", (result,)))
    return Collective(name, name, (piece,), groups, Trips(trips, True), operand or result)


def along(machine, *dimensions):
    """The groups of devices whose coordinates differ in these dimensions alone."""
    groups: dict = {}
    for device in devices_of(machine):
        key = [c for i, c in enumerate(device.coords) if i not in dimensions]
        core = device.id % machine.chip.devices
        groups.setdefault((*key, device.slice_index, core), []).append(device.id)
    return tuple(map(tuple, groups.values()))


V4 = topology("v4:4x4x8")  # Closed in every dimension.
LINE = topology("v4:2x2x1")  # Closed in none.
W, V = V4.chip.link_bandwidth, 2**20


@pytest.mark.parametrize(
    ("machine", "dimensions", "expected"),
    [
        # A ring of 8: 7/8 of V come from both sides. Without the 7/8 it is the scaling book's V/W.
        (V4, (2,), V * 7 / 8 / (2 * W)),
        # 16 chips of a torus of two dimensions, four links each.
        (V4, (0, 1), V * 15 / 16 / (4 * W)),
        (V4, (0, 1, 2), V * 127 / 128 / (6 * W)),
        # A line of two: half of V over one link.
        (LINE, (0,), V / 2 / W),
        (LINE, (0, 1), V * 3 / 4 / (2 * W)),
    ],
)
def test_gathers_and_reductions_fill_the_links_of_all_their_dimensions(
    machine, dimensions, expected
):
    groups = along(machine, *dimensions)
    size = len(groups[0])
    assert seconds(machine, "all-gather", groups, V, V // size) == (pytest.approx(expected), 0)
    scattered = seconds(machine, "reduce-scatter", groups, V // size, V)
    assert scattered == (pytest.approx(expected), 0)
    assert seconds(machine, "all-reduce", groups, V) == (pytest.approx(2 * expected), 0)


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        # Every second chip of the ring of 8: two groups share its links.
        (lambda z: (z[0::2], z[1::2]), V * 3 / 4 / (2 * W / 2)),
        # Its halves, which are lines.
        (lambda z: (z[:4], z[4:]), V * 3 / 4 / W),
        # Every fourth: four groups share, each of two chips that close a ring.
        (lambda z: (z[0::4], z[1::4], z[2::4], z[3::4]), V / 2 / (2 * W / 4)),
        # The slowest group counts.
        (lambda z: (z, z[:4]), V * 3 / 4 / W),
    ],
)
def test_parts_of_a_ring_have_parts_of_its_bandwidth(groups, expected):
    ring = along(V4, 2)[0]
    found, _ = seconds(V4, "all-gather", groups(ring), V)
    assert found == pytest.approx(expected)


def test_an_exchange_of_all_with_all_is_bound_by_its_longest_row():
    # The ring of 8: B * 8/4 over two links, which is the scaling book's V / (4 * 2W) with V = 8 B.
    assert seconds(V4, "all-to-all", along(V4, 2), V) == (pytest.approx(V / W), 0)
    assert seconds(V4, "all-to-all", along(V4, 0, 1, 2), V) == (pytest.approx(V / W), 0)
    # The ring of 4: half of it.
    assert seconds(V4, "all-to-all", along(V4, 0), V) == (pytest.approx(V / 2 / W), 0)
    # Two chips send each other half of what they have.
    assert seconds(LINE, "all-to-all", along(LINE, 0), V) == (pytest.approx(V / 2 / W), 0)


@pytest.mark.parametrize(("result", "operand"), [(2 * V, V), (V, 2 * V)])
def test_a_ragged_exchange_sends_no_more_than_either_side_can_hold(result, operand):
    found = seconds(V4, "ragged-all-to-all", along(V4, 2), result, operand)
    assert found == seconds(V4, "all-to-all", along(V4, 2), V)


def test_a_permutation_goes_over_one_link():
    assert seconds(V4, "collective-permute", along(V4, 2), V) == (pytest.approx(V / W), 0)


def test_two_cores_of_a_chip_talk_freely_and_share_its_links():
    machine = topology("v3:32x32")
    link = machine.chip.link_bandwidth
    chips = tuple((2 * chip, 2 * chip + 1) for chip in range(machine.chips))
    for name in ("all-reduce", "all-to-all", "collective-permute"):
        assert seconds(machine, name, chips, V) == (0, 0)
    # 32 chips in a ring, one core of each: both cores' groups gather V over the same two links.
    one_core = seconds(machine, "all-gather", along(machine, 0), V)
    assert one_core == (pytest.approx(2 * V * 31 / 32 / (2 * link)), 0)
    # Both cores of them: what comes to the chip is for both.
    pairs = zip(*[iter(along(machine, 0))] * 2, strict=True)
    both = seconds(machine, "all-gather", tuple((*a, *b) for a, b in pairs), V)
    assert both == (pytest.approx(V * 31 / 32 / (2 * link)), 0)
    # Each core has B to send: 2 * B * 32/4 over two links.
    exchanged = seconds(machine, "all-to-all", along(machine, 0), V)
    assert exchanged == (pytest.approx(8 * V / link), 0)


SLICES = topology("2*v5e:4x4")  # Neither dimension is closed.


def test_slices_exchange_their_sums_after_reducing_within():
    link, network = SLICES.chip.link_bandwidth, SLICES.chip.dcn_bandwidth
    # 16 chips of each slice hold a sixteenth of the slice's sum; half of the parts are elsewhere.
    everyone = (tuple(range(32)),)
    assert seconds(SLICES, "all-reduce", everyone, V) == (
        pytest.approx(2 * V * 15 / 16 / (2 * link)),
        pytest.approx(2 * V / 2 / 16 / network),
    )
    # The same chip in both slices.
    pairs = tuple((chip, chip + 16) for chip in range(16))
    assert seconds(SLICES, "all-reduce", pairs, V) == (0, pytest.approx(V / network))
    assert seconds(SLICES, "collective-permute", pairs, V) == (0, pytest.approx(V / network))
    # Half of what a device has goes to the other slice, half stays in its 4 x 4.
    assert seconds(SLICES, "all-to-all", everyone, V) == (
        pytest.approx(V / 2 / link),
        pytest.approx(V / 2 / network),
    )


def test_gpus_talk_through_a_switch_and_hosts_through_the_network():
    machine = topology("gpu-h100-16")
    mesh = Mesh(
        np.array([Device(number, (), 0) for number in range(16)]).reshape(16, 1, 1),
        ("data", "expert", "model"),
    )
    link, network = machine.chip.link_bandwidth, machine.chip.dcn_bandwidth
    host = collective("all-to-all", (tuple(range(8)), tuple(range(8, 16))), V)
    assert collective_seconds(host, mesh, machine) == (pytest.approx(V * 7 / 8 / link), 0)
    everyone = collective("all-gather", (tuple(range(16)),), V)
    assert collective_seconds(everyone, mesh, machine) == (
        pytest.approx(V * 7 / 8 / link),
        pytest.approx(V / 2 / 8 / network),
    )


def test_a_host_of_fewer_gpus_is_a_host():
    machine = topology("h100:2x4")
    mesh = Mesh(
        np.array([Device(number, (), 0) for number in range(8)]).reshape(8, 1, 1),
        ("data", "expert", "model"),
    )
    pair = collective("collective-permute", ((3, 4),), V)
    assert collective_seconds(pair, mesh, machine) == (0, V / machine.chip.dcn_bandwidth)


def test_the_roofline_adds_up_each_resource():
    mesh = Mesh(np.array(devices_of(V4)).reshape(-1, 1, 1), ("data", "expert", "model"))
    ring = along(V4, 2)
    found = roofline(
        2 * V4.chip.matrix_flops,
        3 * V4.chip.hbm_bandwidth,
        [collective("all-to-all", ring, int(W), trips=4), collective("all-to-all", ring, int(W))],
        mesh,
        V4,
    )
    assert dataclasses.astuple(found) == pytest.approx((2, 3, 5, 0))
    assert (found.seconds, found.sum) == (pytest.approx(5), pytest.approx(10))
    assert found.binding == "interconnect"


@pytest.mark.parametrize("binding", ["compute", "memory", "interconnect", "network"])
def test_the_largest_term_binds(binding):
    terms = {"compute": 1.0, "memory": 1.0, "interconnect": 1.0, "network": 1.0}
    assert Roofline(**{**terms, binding: 2.0}).binding == binding


@pytest.mark.tpu
@pytest.mark.parametrize("name", ["v4:4x4x8", "v3:4x4", "2*v5e:4x4"])
def test_libtpus_devices_lie_where_these_tests_say(name):
    machine = topology(name)
    theirs = [
        (tuple(device.coords), getattr(device, "slice_index", None) or 0)
        for device in describe(machine)
    ]
    ours = [(device.coords, device.slice_index) for device in devices_of(machine)]
    assert len(ours) == math.prod(machine.shape) * machine.chip.devices * machine.slices
    assert sorted(theirs) == sorted(ours)
