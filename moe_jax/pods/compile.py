"""The training step of a config, compiled for a machine that need not be here.

For TPUs libtpu compiles on any Linux x86-64 host, for GPUs XLA's plugin for CUDA. Neither asks for the
hardware; only, without GPUs the plugin does not try which of its own kernels are fastest. Where the plugin
is not installed, XLA for CPU compiles the same mesh, whose collectives and memory are near those of GPUs,
while its FLOPs are those of CPU code, without attention kernels.
"""

import collections
import dataclasses
import importlib.metadata
import logging
import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import jax
from jax.sharding import Mesh

from moe_jax.analysis.accounting.costs import count
from moe_jax.analysis.accounting.training import TrainingFlops, training_flops
from moe_jax.analysis.hlo import Program
from moe_jax.errors import UserError
from moe_jax.parallel.mesh import force_host_devices, mesh_of
from moe_jax.pods import absent_gpu, hardware
from moe_jax.pods.hardware import GPU_COMPILER, Chip, Topology
from moe_jax.pods.report import GIB, CollectiveSum, DeviceMemory, PodReport, Terms
from moe_jax.pods.roofline import collective_seconds, roofline
from moe_jax.training.experiment import Experiment
from moe_jax.training.run import Run

_LOG = logging.getLogger(__name__)

_REFUSAL = re.compile(r"\((?P<needed>[\d.]+)(?P<unit>[KMGT])\) exceeds available HBM")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def compile_step(
    config: Experiment,
    topology: Topology,
    *,
    name: str = "the config",
    note: str = "",
    changes: Mapping[str, Any] | None = None,
) -> PodReport:
    """Compiles the step that the trainer runs, at the global batch, and reads the program.

    Args:
      config: laid out for the machine.
      topology: the machine.
      name: what the report calls the config.
      note, changes: of its layout.

    Raises:
      UserError: the config is not valid, its mesh has not as many devices as the machine, or the
        machine's compiler is not installed. A step that does not fit is no error: see `fits`.
    """
    if config.mesh.size != topology.devices:
        raise UserError(
            f"the mesh {config.mesh} has {config.mesh.size} devices, but {topology.name} has "
            f"{topology.devices} ({topology.chips} chips); make the axes multiply to that."
        )
    if config.mesh.data % topology.slices:
        raise UserError(
            f"mesh.data is {config.mesh.data}, which the {topology.slices} slices or clusters of "
            f"{topology.name} do not divide; only the data axis goes over them, so make it a multiple of "
            f"{topology.slices}."
        )
    config.validate()
    devices, platform = _devices(topology)
    run = Run.on(config, mesh_of(config.mesh, devices))
    counted = config.with_group_sizes()
    accounted = training_flops(counted.model, counted.data, platform, run.mesh.shape)
    start = time.perf_counter()
    compiled, refusal = _compile(run, topology, platform)
    seconds = time.perf_counter() - start
    memory = _memory(run, topology, compiled, refusal)
    reading = _read(run, topology, compiled, accounted)
    return PodReport(
        config=name,
        changes=dict(changes or {}),
        note=note,
        topology=topology.code,
        hardware=topology.name,
        compiled_for=platform,
        compiler=compiler_version(platform),
        chips=topology.chips,
        devices=topology.devices,
        mesh=dict(run.mesh.shape),
        params=count(run.shapes.parameters),
        parameter_dtype=_dtypes(run.shapes.parameters),
        optimizer=f"{type(config.optimizer).__name__} ({_dtypes(run.shapes.optimizer)})",
        rows_per_step=config.data.batch_size,
        tokens_per_step=config.data.batch_size * config.data.tokens_per_row,
        unit="token" if config.data.tokens_per_row > 1 else "image",
        hbm=memory,
        memory_fraction=memory_fraction(topology.chip),
        fits=not refusal and not memory.missing,
        refusal=refusal,
        flops_per_device=reading.flops,
        accounted_flops_per_device=accounted.executed / topology.devices,
        algorithmic_flops_per_device=accounted.algorithmic / topology.devices,
        memory_bytes_per_device=reading.memory_bytes,
        collectives=reading.collectives,
        roofline=reading.terms,
        exact=reading.exact,
        compile_seconds=seconds,
    )


# What compiles for a platform, the first that is installed.
_COMPILERS = {
    "tpu": ("libtpu",),
    "gpu": ("jax-cuda12-pjrt", "jax-cuda13-pjrt", "jaxlib"),
    "cpu": ("jaxlib",),
}


def compiler_version(platform: str) -> str:
    """Such as `libtpu 0.0.42.1`; of XLA itself for CPUs, also where they stand for GPUs.

    Raises:
      UserError: libtpu is not installed.
    """
    for package in _COMPILERS[platform]:
        try:
            return f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    raise UserError(
        "libtpu, which compiles for TPUs, is not installed; run make install EXTRA=tpu on Linux on "
        "x86_64."
    )


# The newer name goes first, as in JAX.
_FRACTION_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


def set_memory_fraction(fraction: float) -> None:
    """Sets the variable by which JAX in this process takes so much of a GPU."""
    for name in _FRACTION_VARIABLES:
        os.environ.pop(name, None)
    os.environ[_FRACTION_VARIABLES[0]] = str(fraction)


def memory_fraction(chip: Chip) -> float:
    """The share of a device's `hbm` that a program may use: all of a TPU, of a GPU what JAX takes.

    JAX takes three quarters of a GPU when it starts, unless one of its variables says how much.

    Raises:
      UserError: the variable is no number above 0 and up to 1.
    """
    if not chip.gpu:
        return 1.0
    name, text = next(
        ((name, value) for name in _FRACTION_VARIABLES if (value := os.environ.get(name))),
        ("", "0.75"),
    )
    try:
        fraction = float(text)
    except ValueError:
        fraction = 0.0
    if not 0 < fraction <= 1:
        raise UserError(
            f"{name} is {text!r}; it is the share of a GPU's memory that JAX takes, such as 0.9."
        )
    return fraction


def _devices(topology: Topology) -> tuple[Sequence[jax.Device], str]:
    """(devices to compile for, their platform)."""
    try:
        return hardware.describe(topology), topology.chip.platform
    except hardware.NoCompilerError:
        if not topology.chip.gpu:
            raise
    force_host_devices(topology.devices)  # Before the backend starts.
    devices = jax.devices("cpu")[: topology.devices]
    if len(devices) < topology.devices:
        raise UserError(
            f"topology is {topology.name}, but there are {len(devices)} CPU devices to stand for its "
            f"{topology.devices} GPUs; compile it in a process that has not used JAX yet, or "
            f"{GPU_COMPILER}."
        )
    _LOG.warning("%s", stand_in_sentence(topology.name))
    return devices, "cpu"


def stand_in_sentence(hardware: str) -> str:
    """What to know of a report that was compiled for CPUs in place of GPUs."""
    return (
        f"XLA for CPU compiles the mesh in place of {hardware}, because XLA's plugin for CUDA is not "
        "installed: collectives and memory are near those of GPUs, FLOPs and times are not. To compile for "
        f"GPUs, {GPU_COMPILER}."
    )


def _compile(run: Run, topology: Topology, platform: str) -> tuple[Any, str]:
    """(compiled step, "") or (None, why it cannot be for lack of memory)."""
    if _state_bytes(run)[0] > _capacity(topology):
        return None, "parameters and optimizer state alone are too large"
    gpu = platform == "gpu"
    around = absent_gpu.as_if_here(run.mesh.devices.flat[0]) if gpu else nullcontext()
    with _no_cache(), jax.set_mesh(run.mesh), around:
        lowered = run.train_step.lower(*run.abstract_arguments())
        try:
            compiled = absent_gpu.compile_for(lowered, topology.code) if gpu else lowered.compile()
            return compiled, ""
        except jax.errors.JaxRuntimeError as error:
            reason = str(error).split("\n", 1)[0]
            if _REFUSAL.search(reason):
                return None, reason
            raise UserError(
                f"the compiler cannot compile the step on mesh {run.config.mesh} ({reason.rstrip('.')}); "
                "try another mesh or dispatch."
            ) from error


@contextmanager
def _no_cache() -> Iterator[None]:
    """The cache of compiled programs asks for a device to load one into."""
    enabled = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)


def _capacity(topology: Topology) -> int:
    """Bytes of a device that a program may use."""
    return int(topology.chip.hbm * memory_fraction(topology.chip))


def _memory(run: Run, topology: Topology, compiled: Any, refusal: str) -> DeviceMemory:
    state, parameters, optimizer_state = _state_bytes(run)
    capacity = _capacity(topology)
    if compiled:
        found = compiled.memory_analysis()
        return DeviceMemory(
            arguments=found.argument_size_in_bytes,
            parameters=parameters,
            optimizer_state=optimizer_state,
            outputs=found.output_size_in_bytes,
            aliased=found.alias_size_in_bytes,
            temporaries=found.temp_size_in_bytes,
            program=found.generated_code_size_in_bytes,
            capacity=capacity,
        )
    needed = _REFUSAL.search(refusal)
    total = int(float(needed["needed"]) * _UNITS[needed["unit"]]) if needed else None
    return DeviceMemory(
        arguments=state,
        parameters=parameters,
        optimizer_state=optimizer_state,
        outputs=state,
        aliased=state,
        temporaries=None if total is None else max(total - state, 0),
        program=0,
        capacity=capacity,
    )


def _state_bytes(run: Run) -> tuple[int, int, int]:
    """Of a device: (both, parameters, optimizer state)."""
    parameters = _bytes_per_device(run.shapes.parameters, run.shardings.parameters)
    optimizer_state = _bytes_per_device(run.shapes.optimizer, run.shardings.optimizer)
    return parameters + optimizer_state, parameters, optimizer_state


def _bytes_per_device(shapes: Any, shardings: Any) -> int:
    sizes = jax.tree.map(
        lambda leaf, sharding: math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize,
        shapes,
        shardings,
    )
    return sum(jax.tree.leaves(sizes))


def _dtypes(tree: Any) -> str:
    """The dtypes of all arrays with a dimension, such as float32."""
    names = {str(leaf.dtype) for leaf in jax.tree.leaves(tree) if leaf.shape}
    return ", ".join(sorted(names))


@dataclasses.dataclass(frozen=True)
class _Reading:
    """What the text of a compiled step says; nothing where there is none. See `PodReport`."""

    flops: float = 0.0
    memory_bytes: float = 0.0
    collectives: tuple[CollectiveSum, ...] = ()
    terms: Terms | None = None
    exact: bool = True


def _read(run: Run, topology: Topology, compiled: Any, accounted: TrainingFlops) -> _Reading:
    if compiled is None:
        return _Reading()
    program = Program(compiled.as_text() or "")
    products = [(one.flops, one.trips) for one in program.matrix_products()]
    kernels = [(one.flops, one.trips) for one in program.kernels()]
    in_program = sum(flops * trips.count for flops, trips in products + kernels)
    flops = in_program - accounted.skipped / topology.devices
    traffic, found = program.memory_bytes(), program.collectives()
    line = roofline(flops, traffic.count, found, run.mesh, topology)
    peak = topology.chip.matrix_flops * topology.devices
    tokens = run.config.data.batch_size * run.config.data.tokens_per_row
    collectives = _summed(found, run.mesh, topology)
    return _Reading(
        flops,
        traffic.count,
        collectives,
        Terms(
            compute=line.compute,
            memory=line.memory,
            interconnect=line.interconnect,
            network=line.network,
            binding=line.binding,
            step_seconds=line.seconds,
            mfu=accounted.algorithmic / peak / line.seconds,
            mfu_without_overlap=accounted.algorithmic / peak / line.sum,
            tokens_per_second_per_chip=tokens / line.seconds / topology.chips,
        ),
        exact=traffic.exact
        and all(trips.exact for _, trips in products + kernels)
        and all(one.exact for one in collectives),
    )


def _summed(found: Any, mesh: Mesh, topology: Topology) -> tuple[CollectiveSum, ...]:
    """Collectives of a program by kind and axes, the slowest first."""
    grouped = collections.defaultdict(list)
    for one in found:
        grouped[one.name, one.axes(mesh.shape)].append(one)
    sums = [
        CollectiveSum(
            kind=kind,
            axes=axes,
            count=sum(one.trips.count for one in ones),
            bytes=sum(one.trips.count * one.bytes for one in ones),
            seconds=sum(
                one.trips.count * sum(collective_seconds(one, mesh, topology)) for one in ones
            ),
            exact=all(one.trips.exact for one in ones),
            synchronous=sum(one.trips.count for one in ones if one.synchronous),
        )
        for (kind, axes), ones in grouped.items()
    ]
    return tuple(sorted(sums, key=lambda one: (-one.seconds, one.kind, one.axes)))


def refusal_sentence(report: PodReport) -> str:
    """By how much a step does not fit, and what takes most."""
    memory = report.hbm
    least = "at least " if memory.temporaries is None else ""
    return (
        f"{report.config} does not fit on {report.hardware}: a device needs {least}"
        f"{memory.total / GIB:.1f} GiB and has {memory.capacity / GIB:.1f}, "
        f"{memory.missing / GIB:.1f} too few, and most of it is {memory.largest}; use more devices, a "
        "mesh that splits more, remat=full or more microbatches."
    )
