"""The device mesh: its axes, its making, and the mesh in force.

Axes
  data    data parallelism: rows of the batch, and FSDP of expert weights
  expert  expert parallelism: experts, and rows of the batch outside the experts
  model   tensor parallelism: attention heads and feed-forward width
"""

import contextlib
import dataclasses
import math
import os
import re
from collections.abc import Sequence

import jax
from jax._src import distributed
from jax.experimental import mesh_utils
from jax.extend.backend import get_default_device
from jax.sharding import AxisType, Mesh

from moe_jax.component import Component
from moe_jax.errors import UserError

DATA, EXPERT, MODEL = "data", "expert", "model"
AXES = (DATA, EXPERT, MODEL)
TOKEN_AXES = (DATA, EXPERT)  # Tokens are split over both and replicated over `model`.
THREADS_PER_HOST_DEVICE = 4  # See `force_host_devices`.
USUAL_HOST_DEVICES = 8  # Where a notebook's first mesh does not say what the next ones will need.
MOST_HOST_DEVICES = (
    1024  # Each has threads and a share of every array; 100,000 take hours to start.
)
FSDP_MIN_SIZE = 2**18  # Elements of the smallest parameter that is worth gathering.


@dataclasses.dataclass
class MeshConfig(Component):
    """Devices along each mesh axis.

    Attributes:
      data: devices along the data-parallel axis.
      expert: devices along the expert-parallel axis; divides the number of experts.
      model: devices along the tensor-parallel axis; divides heads and feed-forward widths.
      host_devices: how many devices the CPU backend of each process pretends to have; 0 for its share
        of the mesh (4 of a mesh of 8 in each of two processes). Only read where the CPU is the default
        backend, and only before that backend starts.
      fsdp_min_size: parameters outside the experts with fewer elements stay whole over `data` and
        `expert`, because gathering a small array costs more time than holding it costs memory.
    """

    data: int = 1
    expert: int = 1
    model: int = 1
    host_devices: int = 0
    fsdp_min_size: int = FSDP_MIN_SIZE

    @property
    def size(self) -> int:
        """Devices in the mesh."""
        return self.data * self.expert * self.model

    @property
    def token_shards(self) -> int:
        """Number of different slices of a batch of tokens."""
        return self.data * self.expert

    @property
    def devices_of_process(self) -> int:
        """Devices that a CPU is to pretend to have in this process; does not start JAX's backend."""
        # There is no public name for the number of processes before the backend starts.
        processes = distributed.global_state.num_processes or 1
        return self.host_devices or math.ceil(self.size / processes)

    def __str__(self) -> str:
        return f"data={self.data} x expert={self.expert} x model={self.model}"

    def validate(self) -> None:
        """Raises UserError for an axis that has no device, or more host devices than a CPU can play."""
        for name in AXES:
            if getattr(self, name) < 1:
                raise UserError(
                    f"mesh.{name} is {getattr(self, name)}; it must be at least 1 device."
                )
        if not 0 <= self.host_devices <= MOST_HOST_DEVICES:
            raise UserError(
                f"mesh.host_devices is {self.host_devices}; a CPU can pretend to have at most "
                f"{MOST_HOST_DEVICES} devices, and with 0 it has as many as the mesh."
            )


def force_host_devices(count: int) -> None:
    """Gives the CPU backend `count` devices, or more if more were asked for; no effect on other backends.

    Nor on one that runs already, as in a notebook: `make_mesh` says so where its devices are too few.
    """
    # XLA's CPU collectives each block a thread of one pool while they wait for the other devices. With
    # as many threads as devices, the default, two independent collectives of a few devices take all of
    # them, and the rest wait for ever: a scanned model on data=2 x expert=4 ended with "Termination
    # timeout" in 2 of 4 runs of 30 steps on 2 cores, in 6 of 6 of examples/my_project, in none with
    # four threads a device. Read when the backend starts; what is computed stays the same, to the bit.
    # One device waits for none, and threads beyond the cores only take turns: with 32 a step of 2 layers
    # of width 64 takes 78 ms on 2 cores, with 2 it takes 48.
    if count > 1:
        os.environ.setdefault("PJRT_NPROC", str(THREADS_PER_HOST_DEVICE * count))
    with contextlib.suppress(RuntimeError):
        asked_for = jax.config.jax_num_cpu_devices  # type: ignore[attr-defined]  # -1 where nobody did.
        jax.config.update("jax_num_cpu_devices", max(count, asked_for))


def make_mesh(config: MeshConfig | str) -> Mesh:
    """Makes the mesh over the first devices of the default backend; use it with `jax.set_mesh`.

    In a process that has not computed anything yet and where nobody said how many devices the CPU
    pretends to have, it gets `config.host_devices` of them, or enough for this mesh and further ones.

    Args:
      config: devices along each axis, also as on the command line: "data:2,expert:4".

    Raises:
      UserError: there are fewer devices than the mesh needs.
    """
    if isinstance(config, str):
        config = parse_mesh(config, MeshConfig())
    if jax.config.jax_num_cpu_devices < 0 and config.size > 1:  # type: ignore[attr-defined]
        force_host_devices(max(config.size, config.host_devices or USUAL_HOST_DEVICES))
    devices = jax.devices()
    if config.size > len(devices):
        remedy = (
            f'raise mesh.host_devices, or in Python call jax.config.update("jax_num_cpu_devices", '
            f"{config.size}) before anything is computed"
        )
        if devices[0].platform != "cpu":
            remedy = "use more devices"
        raise UserError(
            f"mesh {config} needs {config.size} devices but there are {len(devices)} "
            f"({devices[0].device_kind}); lower the mesh or {remedy}."
        )
    return mesh_of(config, devices[: config.size])


def mesh_of(config: MeshConfig, devices: Sequence[jax.Device]) -> Mesh:
    """Lays the mesh on these devices, neighbours in it near each other in the machine.

    Of devices of several TPU slices, `data` goes over the slices first, so that only data parallelism
    crosses the slow network between them.

    Args:
      config: of exactly so many devices.
      devices: of one process or all, or of a machine that is only compiled for.

    Raises:
      UserError: `data` does not divide into the slices.
    """
    shape = (config.data, config.expert, config.model)
    slices = len({getattr(d, "slice_index", 0) for d in devices if d.platform == "tpu"}) or 1
    if config.data % slices:
        raise UserError(
            f"mesh.data is {config.data}, which the {slices} slices do not divide; only the data axis "
            f"goes over slices, so make it a multiple of {slices}."
        )
    if slices > 1:
        within = (config.data // slices, config.expert, config.model)
        grid = mesh_utils.create_hybrid_device_mesh(
            within, (slices, 1, 1), devices, allow_split_physical_axes=True
        )
    else:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def mesh_in_force() -> Mesh | jax.sharding.AbstractMesh:
    """The mesh set by `jax.set_mesh`, or else a mesh of one device.

    So a layer may be called in a script that has never heard of meshes.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return make_mesh(MeshConfig()) if mesh.empty else mesh


def mesh_of_arrays(array: jax.Array) -> Mesh | None:
    """The mesh set by `jax.set_mesh` whose devices an array can be put on; None while tracing."""
    if isinstance(array, jax.core.Tracer):
        return None
    try:
        mesh = jax.sharding.get_mesh()
    except ValueError:  # JAX's answer inside jit and its like.
        return None
    return None if mesh.empty else mesh


def platform_in_force() -> str:
    """`cpu`, `gpu` or `tpu`: of the mesh set, which need not be of this machine's devices."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def nvidia_capability() -> float:
    """CUDA compute capability of the GPUs of the mesh set, such as 9.0 of an H100; 0 of other devices.

    A mesh's abstract device names its kind, but not the capability. So it is that of a device of the same
    kind: the one that `jax.default_device` sets, as whoever compiles for GPUs that are not here must,
    or one of this process.
    """
    of_mesh = jax.sharding.get_abstract_mesh().abstract_device
    for device in (get_default_device(), *jax.local_devices()):
        if of_mesh is None or device.device_kind == of_mesh.device_kind:
            try:
                return float(getattr(device, "compute_capability", 0))
            except ValueError:  # AMD's are names.
                return 0.0
    return 0.0


def parse_mesh(text: str, config: MeshConfig) -> MeshConfig:
    """Reads a mesh written as on the command line: `data:2,expert:4`.

    Args:
      text: axis:devices pairs; axes that are not named get 1; empty gives `config`.
      config: supplies everything that is no axis.

    Raises:
      UserError: not of this form.
    """
    if not text:
        return config
    axes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.partition(":")
        if name not in AXES or name in axes or not re.fullmatch("[0-9]{1,9}", size):
            raise UserError(
                f"--mesh is {text!r}; write it as data:2,expert:4,model:1, each axis at most once."
            )
        axes[name] = int(size)
    return dataclasses.replace(config, **(dict.fromkeys(AXES, 1) | axes))
