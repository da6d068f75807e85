import os
import subprocess
import sys

import jax
import pytest
from jax._src import distributed

from moe_jax.errors import UserError
from moe_jax.parallel.mesh import (
    AXES,
    MeshConfig,
    force_host_devices,
    make_mesh,
    mesh_in_force,
    parse_mesh,
)


def test_make_mesh():
    mesh = make_mesh(MeshConfig(data=2, expert=3))
    assert dict(mesh.shape) == {"data": 2, "expert": 3, "model": 1}
    assert list(mesh.devices.flat) == jax.devices()[:6]
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


def test_a_mesh_larger_than_the_devices_is_an_error():
    with pytest.raises(
        UserError,
        match=r"mesh data=3 x expert=4 x model=1 needs 12 devices but there are 8 \(cpu\); lower "
        r"the mesh or raise mesh.host_devices",
    ):
        make_mesh(MeshConfig(data=3, expert=4))


def test_mesh_in_force():
    assert mesh_in_force().size == 1
    with jax.set_mesh(make_mesh(MeshConfig(expert=4))):
        assert mesh_in_force().shape["expert"] == 4


def test_host_devices_cannot_change_once_jax_runs():
    assert jax.device_count() == 8
    force_host_devices(16)
    assert jax.device_count() == 8
    with pytest.raises(
        UserError, match=r'call jax.config.update\("jax_num_cpu_devices", 16\) before'
    ):
        make_mesh("data:16")


@pytest.mark.parametrize(
    ("devices", "given", "threads"), [(8, "", "32"), (8, "5", "5"), (1, "", "None")]
)
def test_host_devices_have_threads_enough_for_collectives_that_wait(devices, given, threads):
    """A number that the user chose stays, and one device waits for none."""
    code = (
        "import os; from moe_jax.parallel.mesh import force_host_devices;"
        f"force_host_devices({devices}); print(os.environ.get('PJRT_NPROC'))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PJRT_NPROC"}
    environment |= {"PJRT_NPROC": given} if given else {}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == threads


def test_sizes():
    config = MeshConfig(data=2, expert=3, model=4)
    assert (config.size, config.token_shards) == (24, 6)


def test_a_cpu_pretends_to_have_what_the_mesh_needs(monkeypatch):
    assert MeshConfig().devices_of_process == 1
    assert MeshConfig(data=2, expert=4).devices_of_process == 8
    assert MeshConfig(data=2, expert=4, host_devices=16).devices_of_process == 16
    monkeypatch.setattr(distributed.global_state, "num_processes", 2)
    assert MeshConfig(data=2, expert=4).devices_of_process == 4
    assert MeshConfig(data=3).devices_of_process == 2


@pytest.mark.parametrize("name", AXES)
def test_an_axis_without_devices_is_an_error(name):
    with pytest.raises(UserError, match=f"mesh.{name} is 0; it must be at least 1 device"):
        MeshConfig(**{name: 0}).validate()


def test_parse_mesh():
    config = MeshConfig(data=8, model=7, fsdp_min_size=5)
    assert parse_mesh("", config) is config
    assert parse_mesh("data:2,expert:4", config) == MeshConfig(2, 4, 1, fsdp_min_size=5)


@pytest.mark.parametrize("text", ["data", "data:x", "rows:2", "data:2;expert:4", "data:-1", ","])
def test_an_unreadable_mesh_is_an_error(text):
    with pytest.raises(UserError, match=f"--mesh is '{text}'; write it as data:2,expert:4"):
        parse_mesh(text, MeshConfig())
