"""Groups of devices in several slices."""

import pytest

from moe_jax.analysis.hlo import Program
from moe_jax.analysis.hlo.groups import groups_between_slices

# As libtpu 0.0.42 writes what goes between slices, of 8 devices in two slices: the text is of one.
TRANSFER = (
    'is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="x_0",'
    '_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="%s"}'
)
PROGRAM = """HloModule jit_step, num_partitions=4

ENTRY %%main (p: f32[4,16]) -> f32[4,16] {
  %%p = f32[4,16]{1,0:T(8,128)} parameter(0)
  %%after-all = token[] after-all()
  %%send = (f32[4,16]{1,0}, u32[], token[]) send(%%p, %%after-all), channel_id=2, TRANSFER
  %%recv = (f32[4,16]{1,0}, u32[], token[]) recv(%%after-all), channel_id=1, TRANSFER
  ROOT %%recv-done = (f32[4,16]{1,0}, token[]) recv-done(%%recv), channel_id=1, is_host_transfer=true
}
"""


def test_each_device_talks_to_its_place_in_the_other_slices():
    groups = groups_between_slices(TRANSFER % "ALL_REDUCE", devices=4)
    assert groups == ((0, 4), (1, 5), (2, 6), (3, 7))
    (all_three,) = groups_between_slices('_xla_megascale_target="{1:3}x{0:0}"', devices=1)
    assert all_three == (0, 1, 2)
    for attributes in ("is_host_transfer=true", '_xla_megascale_target="{1,2}x{0:1}"'):
        with pytest.raises(ValueError, match="in an unknown notation"):
            groups_between_slices(attributes, devices=4)


@pytest.mark.parametrize(
    ("kind", "name", "given"),
    [
        # 4 x 16 floats arrive: 256 bytes.
        ("ALL_REDUCE", "all-reduce", 256),
        ("ALL_TO_ALL", "all-to-all", 256),
        ("ONE_TO_ONE", "collective-permute", 256),
        ("ALL_GATHER", "all-gather", 128),
        ("REDUCE_SCATTER", "reduce-scatter", 512),
    ],
)
def test_transfers_between_slices_are_collectives(kind, name, given):
    text = (PROGRAM % ()).replace("TRANSFER", TRANSFER % kind)
    (found,) = Program(text).collectives()
    assert (found.name, found.bytes, found.operand_bytes) == (name, 256, given)
    # Data parallelism goes over slices: 4 x 2 devices as (data, expert).
    assert found.axes({"data": 4, "expert": 2}) == ("data",)


def test_a_transfer_of_another_type_is_refused():
    text = (PROGRAM % ()).replace("TRANSFER", TRANSFER % "RAGGED_ALL_TO_ALL")
    with pytest.raises(ValueError, match="of an unknown type: 'RAGGED_ALL_TO_ALL'"):
        Program(text).collectives()
