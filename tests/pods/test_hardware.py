"""The table of machines against published figures of whole pods, and against libtpu."""

import math
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from moe_jax.errors import UserError
from moe_jax.parallel.mesh import DATA, MeshConfig, mesh_of, nvidia_capability
from moe_jax.pods import hardware
from moe_jax.pods.gpus import GPUS
from moe_jax.pods.hardware import CHIPS, Topology, describe, topology

TPUS = [chip for chip in CHIPS if chip.platform == "tpu"]
RENTED = [Topology(chip, shape) for chip in TPUS for shape in chip.shapes]


@pytest.mark.parametrize(
    ("text", "slice_name", "chips", "devices"),
    [
        # 1,024 cores are 512 chips of two cores, which work as one device.
        ("tpu-v4-1024", "v4:8x8x8", 512, 512),
        ("tpu-v5p-128", "v5p:4x4x4", 64, 64),
        # The cores of a v3 and of a 7x are devices of their own.
        ("tpu-v3-1024", "v3:16x32", 512, 1024),
        ("tpu7x-64", "tpu7x:2x4x4", 32, 64),
        # These have one core, and their names count chips.
        ("tpu-v5e-256", "v5e:16x16", 256, 256),
        ("tpu-v6e-256", "v6e:16x16", 256, 256),
        ("v5p-128", "v5p:4x4x4", 64, 64),
        ("v4:8x8x16", "v4:8x8x16", 1024, 1024),
        ("2*tpu-v5e-256", "v5e:16x16", 512, 512),
        # Hosts, and the GPUs of each.
        ("gpu-h100-64", "h100:8x8", 64, 64),
        ("h100:8x8", "h100:8x8", 64, 64),
        ("gpu-a100-4", "a100:1x4", 4, 4),
        ("2*h100:8x8", "h100:8x8", 128, 128),
        ("h200:1x1", "h200:1x1", 1, 1),
        ("h800:256x8", "h800:256x8", 2048, 2048),
        ("3*tpu7x:2x2x1", "tpu7x:2x2x1", 12, 24),
    ],
)
def test_a_name_stands_for_so_many_chips(text, slice_name, chips, devices):
    read = topology(text)
    assert (read.slice_name, read.chips, read.devices) == (slice_name, chips, devices)


@pytest.mark.parametrize("machine", RENTED, ids=lambda machine: machine.name)
def test_a_slice_is_read_back_from_both_of_its_names(machine):
    assert topology(machine.name) == machine
    assert topology(machine.slice_name) == machine


@given(
    st.sampled_from([chip for chip in TPUS if chip.torus == 3]),
    st.tuples(*[st.integers(1, 16)] * 3),
    st.integers(1, 4),
)
def test_other_shapes_are_read_and_named_with_their_shape(chip, shape, slices):
    name = "x".join(map(str, shape))
    read = topology(f"{slices}*{chip.compiler}:{name}")
    assert read == Topology(chip, shape, slices)
    assert read.chips == slices * math.prod(shape)
    assert (read.name == read.code) == (shape not in chip.shapes)
    assert topology(read.name) == topology(read.code) == read


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("gpu-h100-64", "h100:8x8"),
        ("gpu-a100-4", "a100:1x4"),
        ("2*gpu-b200-8", "2*b200:1x8"),
        # Two hosts of four are not the usual eight GPUs.
        ("h100:2x4", "h100:2x4"),
    ],
)
def test_gpus_are_read_back_from_both_of_their_names(name, code):
    machine = topology(name)
    assert (machine.name, machine.code) == (name, code)
    assert topology(code) == machine
    assert machine.wraps == (False, False)


@pytest.mark.parametrize(
    ("text", "wraps"),
    [
        # Less than a cube of 4 x 4 x 4 has no optical switches.
        ("v4:2x4x4", (False, False, False)),
        ("v4:4x4x12", (True, True, True)),
        ("v5p:8x8x16", (True, True, True)),
        # In two dimensions only the pod's whole length is closed.
        ("v5e:8x16", (False, True)),
        ("v6e:16x16", (True, True)),
        ("v3:16x16", (False, False)),
        ("v3:16x32", (False, True)),
    ],
)
def test_a_torus_is_closed_where_links_go_around(text, wraps):
    assert topology(text).wraps == wraps


def test_the_table_gives_the_published_figures_of_whole_pods():
    """From Google Cloud's pages; they do not state these figures of a chip but of a pod."""
    v3, v4, v5e, v6e = (chip_named(f"tpu-{name}") for name in ("v3", "v4", "v5e", "v6e"))
    # 2,048 cores reach 126 petaflop/s, 4,096 chips 1.1 exaflop/s, 256 chips 50.63 and 234.9 petaflop/s.
    assert 2048 * v3.matrix_flops == pytest.approx(126e15, rel=0.01)
    assert 4096 * v4.matrix_flops == pytest.approx(1.1e18, rel=0.03)
    assert 256 * v5e.matrix_flops == pytest.approx(50.63e15, rel=0.01)
    assert 256 * v6e.matrix_flops == pytest.approx(234.9e15, rel=0.01)
    # Through the middle: a torus of 16 x 16 is cut at 2 x 16 links, one of 16 x 16 x 16 at 2 x 256.
    assert 2 * 16 * v5e.link_bandwidth == pytest.approx(1.6e12)
    assert 2 * 16 * v6e.link_bandwidth == pytest.approx(3.2e12)
    assert 2 * 256 * v4.link_bandwidth == pytest.approx(24e12, rel=0.07)
    # Into the data-center network: 6.4 and 25.6 Tbit/s.
    assert 8 * 256 * v5e.dcn_bandwidth == pytest.approx(6.4e12)
    assert 8 * 256 * v6e.dcn_bandwidth == pytest.approx(25.6e12)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "tpu-v9-8",
            "topology is 'tpu-v9-8'; write it as tpu-v4-1024, v4:8x8x8, gpu-h100-64, h100:8x8 or, for "
            "two slices, 2*tpu-v5e-256; the chips are tpu-v2, tpu-v3, tpu-v4, tpu-v5e, tpu-v5p, tpu-v6e, "
            "tpu7x, gpu-a100, gpu-h100, gpu-h800, gpu-h200, gpu-b200.",
        ),
        (
            "tpu-v2-64",
            "topology is 'tpu-v2-64'; the number of cores of a tpu-v2 is one of 8, 32, 128, 256, 512, "
            "and other slices are written by their chips along each dimension, such as v2:16x16.",
        ),
        (
            "tpu-v5e-2",
            "topology is 'tpu-v5e-2'; the number of chips of a tpu-v5e is one of 1, 4, 8, 16, 32, 64, "
            "128, 256, and other slices are written by their chips along each dimension, such as "
            "v5e:16x16.",
        ),
        (
            "v4:4x4",
            "topology is 'v4:4x4'; a tpu-v4 has 3 dimensions of at least one chip, such as "
            "v4:16x16x16.",
        ),
        (
            "v5e:0x4",
            "topology is 'v5e:0x4'; a tpu-v5e has 2 dimensions of at least one chip, such as "
            "v5e:16x16.",
        ),
        (
            "v5e:16x32",
            "topology is 'v5e:16x32', which has 512 chips; the largest slice of tpu-v5e is v5e:16x16, "
            "and several of them are written 2*v5e:16x16.",
        ),
        (
            "gpu-h100-12",
            "topology is 'gpu-h100-12'; write gpu-h100- and a number of GPUs up to 8 or a multiple of "
            "8, such as gpu-h100-64, or the hosts and the GPUs of each, h100:8x8.",
        ),
        (
            "gpu-h100-0",
            "topology is 'gpu-h100-0'; write gpu-h100- and a number of GPUs up to 8 or a multiple of "
            "8, such as gpu-h100-64, or the hosts and the GPUs of each, h100:8x8.",
        ),
        (
            "h100:8x16",
            "topology is 'h100:8x16'; of gpu-h100 write the hosts and the GPUs of each, at most 8, such "
            "as h100:8x8.",
        ),
        (
            "h100:64",
            "topology is 'h100:64'; of gpu-h100 write the hosts and the GPUs of each, at most 8, such as "
            "h100:8x8.",
        ),
    ],
)
def test_what_is_no_machine_is_answered_with_those_that_are(text, message):
    with pytest.raises(UserError) as raised:
        topology(text)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    "text", ["", "v4", "v4:", "v4:2x2x", "0*v4:2x2x1", "*v4-8", "v4-8 ", "v4-\u0661", "gpu-h100:8"]
)
def test_what_has_not_the_form_of_a_machine_is_refused(text):
    with pytest.raises(UserError, match="write it as tpu-v4-1024"):
        topology(text)


def test_without_the_plugin_the_user_learns_how_to_get_it(monkeypatch):
    def without_plugin(*_, **__):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(hardware.topologies, "get_topology_desc", without_plugin)
    monkeypatch.setenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "")
    with pytest.raises(hardware.NoCompilerError) as raised:
        describe(topology("h100:8x8"))
    assert str(raised.value) == (
        "topology is gpu-h100-64, which XLA's plugin for CUDA compiles for and it is not installed; run "
        "make install-gpu-compiler on Linux, which needs no GPU, and then .venv-gpu/bin/python in place "
        "of python."
    )


def test_without_libtpu_the_user_learns_how_to_get_it(monkeypatch):
    def without_libtpu(*_, **__):
        raise RuntimeError("JAX TPU support not installed")

    monkeypatch.setattr(hardware.topologies, "get_topology_desc", without_libtpu)
    monkeypatch.setattr(hardware.xla_client, "pjrt_plugin_loaded", lambda name: True)
    with pytest.raises(UserError) as raised:
        describe(topology("tpu-v4-8"))
    assert str(raised.value) == (
        "topology is tpu-v4-8, which libtpu compiles for and it is not installed; run make install "
        "EXTRA=tpu on Linux on x86_64."
    )


@pytest.fixture(scope="module")
def compiler_settings() -> None:
    """Undoes what makes the other tests fast; these run in a process of their own."""
    jax.config.update("jax_disable_most_optimizations", False)
    jax.config.update("jax_enable_compilation_cache", False)  # It asks for a TPU to load into.


@pytest.mark.tpu
@pytest.mark.parametrize("machine", RENTED, ids=lambda machine: machine.name)
def test_libtpu_knows_every_slice_and_has_as_many_devices(machine):
    devices = describe(machine)
    assert len(devices) == machine.devices
    assert devices[0].num_cores * machine.chip.devices == machine.chip.cores


@pytest.mark.tpu
def test_describing_starts_no_backend_and_prints_nothing():
    script = """
import jax
from jax._src import xla_bridge
from moe_jax.pods.hardware import describe, topology
assert len(describe(topology("tpu-v5p-8"))) == len(describe(topology("tpu-v5p-8"))) == 4
assert not xla_bridge.backends_are_initialized()
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout + done.stderr == ""


@pytest.mark.tpu
def test_a_slice_that_libtpu_refuses_is_reported_with_its_reason():
    with pytest.raises(UserError, match=r"^topology is v4:3x3x3, which libtpu does not know"):
        describe(topology("v4:3x3x3"))


@pytest.mark.tpu
@pytest.mark.parametrize("chip", TPUS, ids=lambda chip: chip.name)
def test_memory_is_what_libtpu_says_it_has(chip, compiler_settings):
    device = describe(Topology(chip, chip.shapes[0]))[0]
    # 200 GiB in, and out twice.
    x = jax.ShapeDtypeStruct((200, 2**28), jnp.float32, sharding=SingleDeviceSharding(device))
    with pytest.raises(jax.errors.JaxRuntimeError) as raised:
        jax.jit(lambda x: (x + 1, x.T + 2)).lower(x).compile()
    found = re.search(r"exceeds available HBM \(([\d.]+)G\)", str(raised.value))
    assert found is not None
    assert chip.hbm == round(float(found[1]) * 2**30)


@pytest.mark.tpu
@pytest.mark.parametrize("text", ["2*v4:2x2x2", "2*v5e:4x4", "2*v5p:2x2x2", "2*tpu7x-16"])
def test_a_program_over_two_slices_sums_within_them_and_then_through_the_network(
    text, compiler_settings
):
    machine = topology(text)
    mesh = mesh_of(MeshConfig(data=machine.devices // 2, expert=2), describe(machine))
    halves = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    half = machine.devices // 4
    assert (halves[:half] == 0).all() and (halves[half:] == 1).all()
    rows = NamedSharding(mesh, PartitionSpec(DATA))
    x = jax.ShapeDtypeStruct((4096, 1024), jnp.float32, sharding=rows)
    everywhere = NamedSharding(mesh, PartitionSpec())
    total = jax.jit(lambda x: x.sum(0), out_shardings=everywhere).lower(x).compile()
    assert '_xla_megascale_transfer_type="ALL_REDUCE"' in (total.as_text() or "")


@pytest.mark.gpu
@pytest.mark.parametrize("model", GPUS)
def test_xla_reads_the_description_of_every_gpu(model):
    gpu, devices = GPUS[model], describe(topology(f"2*{model}:3x8"))
    assert [device.id for device in devices] == list(range(48))
    assert [device.process_index for device in devices] == [i // 8 for i in range(48)]
    assert (devices[0].platform, devices[0].device_kind) == ("gpu", gpu.name)
    assert devices[0].compute_capability == "{}.{}".format(*gpu.capability)
    assert devices[0].core_count == gpu.cores


@pytest.mark.gpu
@pytest.mark.parametrize("model", GPUS)
def test_the_capability_is_that_of_the_meshs_gpus(model):
    devices = describe(topology(f"{model}:1x2"))
    major, minor = GPUS[model].capability
    with jax.set_mesh(mesh_of(MeshConfig(expert=2), devices)), jax.default_device(devices[0]):
        assert nvidia_capability() == major + minor / 10
        # While a program is traced, too.
        assert jax.eval_shape(lambda: jnp.zeros(int(nvidia_capability()))).shape == (major,)


@pytest.mark.gpu
def test_describing_gpus_starts_no_backend_and_needs_no_cuda():
    script = """
import jax
from jax._src import xla_bridge
from moe_jax.pods.hardware import describe, topology
assert len(describe(topology("h100:8x8"))) == 64
assert not xla_bridge.backends_are_initialized()
assert jax.default_backend() == "cpu"
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def chip_named(name: str) -> hardware.Chip:
    return next(chip for chip in CHIPS if chip.name == name)
