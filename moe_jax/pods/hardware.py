"""Machines to train on: what one chip can do, how many stand together, and their names.

Numbers are per DEVICE, what `jax.Device` stands for and a program is compiled for. A TPU v4 or v5p is
one device (its two cores work as one, which libtpu calls megacore), a v5e or v6e has one core; of a
v2, v3 or 7x each core is a device with half of the chip's memory. A GPU is a device.

Two ways to write a machine: as Google Cloud names slices, tpu-v4-1024 (or v4-1024), where the number
counts cores or chips depending on the generation; and as libtpu does, v4:8x8x8, the chips along each
dimension of the torus. `2*tpu-v5e-256` is two slices, which only the data-center network connects.
GPUs are written the same two ways, gpu-h100-64 or h100:8x8: hosts, and GPUs of a host, between which
NVLink is. 2*gpu-h100-64 is two such clusters; only data parallelism goes over both, while the network
between them is counted like that between hosts.
"""

import dataclasses
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies
from jaxlib import xla_client

from moe_jax.errors import UserError
from moe_jax.pods.gpus import GPUS, Gpu

_GIB = 2**30

# How to get XLA's plugin for CUDA, for sentences.
GPU_COMPILER = (
    "run make install-gpu-compiler on Linux, which needs no GPU, and then .venv-gpu/bin/python in place of "
    "python"
)


class NoCompilerError(UserError):
    """What compiles for a machine is not installed."""


_TPU_DOCS = "https://cloud.google.com/tpu/docs/"
# "A domain-specific supercomputer for training deep neural networks", on TPU v2 and v3.
_SUPERCOMPUTER = "https://dl.acm.org/doi/10.1145/3360307"
# "TPU v4: an optically reconfigurable supercomputer for machine learning".
_TPU_V4 = "https://arxiv.org/abs/2304.01433"
# "How to scale your model", on TPUs.
_SCALING_BOOK = "https://jax-ml.github.io/scaling-book/tpus/"
_NVIDIA, _DGX = "https://www.nvidia.com/en-us/data-center/", "https://docs.nvidia.com/dgx/"

_2D = ((2, 2), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_3D = (
    (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8), (8, 8, 16),
    (8, 16, 16), (16, 16, 16),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of accelerator.

    Attributes:
      name: as a person writes it, such as tpu-v4.
      compiler: libtpu's name of the generation, such as v4; of a GPU its model, such as h100.
      cores: TensorCores of a chip; 1 for a GPU.
      devices: JAX devices of a chip.
      hbm: bytes of a device that a program may use. Of a TPU what libtpu 0.0.42 refused to exceed
        ("exceeds available HBM (30.75G)", two decimals) for a program that needs 600 GiB, which is
        less than the data sheet says. Of a GPU what its driver shows, of which JAX takes a fraction:
        see `moe_jax.pods.compile.memory_fraction`.
      hbm_bandwidth: bytes/s of a device.
      matrix_flops: FLOP/s of a device in dense bfloat16 products, the data sheet's peak.
      link_bandwidth: bytes/s in one direction of one link to a neighbour in the torus; the links are
        the chip's, so its devices share them. Of a GPU, of all its NVLinks together.
      torus: dimensions of the interconnect, 2 or 3; 0 where a switch connects all of a host.
      dcn_bandwidth: bytes/s in one direction of a device into the network between slices or hosts.
      chips_per_host: chips of one process of a machine of several. (v5e and v6e are also rented as
        single hosts of 1 and of 8.)
      counts_cores: the number in the name counts cores, not chips.
      shapes: slices that are rented, by size; empty for a GPU.
      sources: of the numbers.
      gpu: what XLA asks of it; None for a TPU.
    """

    name: str
    compiler: str
    cores: int
    devices: int
    hbm: int
    hbm_bandwidth: float
    matrix_flops: float
    link_bandwidth: float
    torus: int
    dcn_bandwidth: float
    chips_per_host: int
    counts_cores: bool
    shapes: tuple[tuple[int, ...], ...]
    sources: tuple[str, ...]
    gpu: Gpu | None = None

    @property
    def platform(self) -> str:
        """`tpu` or `gpu`, as JAX names them."""
        return "gpu" if self.gpu else "tpu"

    def number(self, shape: tuple[int, ...]) -> int:
        """What the name of a slice counts."""
        return math.prod(shape) * (self.cores if self.counts_cores else 1)


def _gpu(
    model: str,
    hbm_bandwidth: float,
    matrix_flops: float,
    nvlink: float,
    network: float,
    *sources: str,
) -> Chip:
    """An NVIDIA GPU in an SXM socket, eight to a host; `Chip` has the units.

    Args:
      model: one of `GPUS`.
      sources: pages of its data sheet, and of the host that has `network`.
    """
    return Chip(
        name=f"gpu-{model}",
        compiler=model,
        cores=1,
        devices=1,
        hbm=GPUS[model].memory,
        hbm_bandwidth=hbm_bandwidth,
        matrix_flops=matrix_flops,
        link_bandwidth=nvlink,
        torus=0,
        dcn_bandwidth=network,
        chips_per_host=8,
        counts_cores=False,
        shapes=(),
        sources=sources,
        gpu=GPUS[model],
    )


# Rates of a chip are divided by its devices where there are two. Bidirectional rates of a chip are
# divided by two and by the links, 4 in a torus of two dimensions and 6 in one of three.
CHIPS = (
    Chip(
        name="tpu-v2",
        compiler="v2",
        cores=2,
        devices=2,
        hbm=round(7.48 * _GIB),
        hbm_bandwidth=700e9 / 2,
        matrix_flops=46e12 / 2,
        link_bandwidth=496e9 / 8,
        torus=2,
        # No sheet says; 25 GB/s is what the scaling book calls typical of a host.
        dcn_bandwidth=25e9 / 8,
        chips_per_host=4,
        counts_cores=True,
        shapes=((2, 2), (4, 4), (8, 8), (8, 16), (16, 16)),
        sources=(_TPU_DOCS + "v2", _SUPERCOMPUTER, _SCALING_BOOK),
    ),
    Chip(
        name="tpu-v3",
        compiler="v3",
        cores=2,
        devices=2,
        hbm=round(15.48 * _GIB),
        hbm_bandwidth=900e9 / 2,
        matrix_flops=123e12 / 2,
        # The paper on v4 says 70 GB/s; the scaling book 100, and so does Google Cloud with 6.4 TB/s
        # through the 64 links that cross the middle of a pod.
        link_bandwidth=656e9 / 8,
        torus=2,
        # As for v2.
        dcn_bandwidth=25e9 / 8,
        chips_per_host=4,
        counts_cores=True,
        shapes=(*_2D, (16, 32), (32, 32)),
        sources=(_TPU_DOCS + "v3", _SUPERCOMPUTER, _TPU_V4, _SCALING_BOOK),
    ),
    Chip(
        name="tpu-v4",
        compiler="v4",
        cores=2,
        devices=1,
        hbm=round(30.75 * _GIB),
        hbm_bandwidth=1200e9,
        matrix_flops=275e12,
        # The scaling book says 45 GB/s, Google Cloud 24 TB/s through the 512 links across the middle.
        link_bandwidth=50e9,
        torus=3,
        # As for v2, but four devices to a host.
        dcn_bandwidth=25e9 / 4,
        chips_per_host=4,
        counts_cores=True,
        shapes=_3D,
        sources=(_TPU_DOCS + "v4", _TPU_V4, _SCALING_BOOK),
    ),
    Chip(
        name="tpu-v5e",
        compiler="v5e",
        cores=1,
        devices=1,
        hbm=round(15.75 * _GIB),
        hbm_bandwidth=819e9,
        matrix_flops=197e12,
        link_bandwidth=400e9 / 2 / 4,
        torus=2,
        dcn_bandwidth=6.4e12 / 8 / 256,
        chips_per_host=4,
        counts_cores=False,
        shapes=((1, 1), (2, 2), (2, 4), *_2D[1:]),
        sources=(_TPU_DOCS + "v5e",),
    ),
    Chip(
        name="tpu-v5p",
        compiler="v5p",
        cores=2,
        devices=1,
        hbm=round(95.74 * _GIB),
        hbm_bandwidth=2765e9,
        matrix_flops=459e12,
        link_bandwidth=1200e9 / 2 / 6,
        torus=3,
        dcn_bandwidth=50e9 / 8,
        chips_per_host=4,
        counts_cores=True,
        shapes=(*_3D, (16, 16, 24)),
        sources=(_TPU_DOCS + "v5p",),
    ),
    Chip(
        name="tpu-v6e",
        compiler="v6e",
        cores=1,
        devices=1,
        hbm=round(31.25 * _GIB),
        hbm_bandwidth=1638e9,
        matrix_flops=918e12,
        link_bandwidth=800e9 / 2 / 4,
        torus=2,
        dcn_bandwidth=100e9 / 8,
        chips_per_host=4,
        counts_cores=False,
        shapes=((1, 1), (2, 2), (2, 4), *_2D[1:]),
        sources=(_TPU_DOCS + "v6e", _TPU_DOCS + "tpu7x"),
    ),
    Chip(
        name="tpu7x",
        compiler="tpu7x",
        cores=2,
        devices=2,
        hbm=round(94.75 * _GIB),
        hbm_bandwidth=7380e9 / 2,
        matrix_flops=2307e12 / 2,
        link_bandwidth=1200e9 / 2 / 6,
        torus=3,
        dcn_bandwidth=100e9 / 8 / 2,
        chips_per_host=4,
        counts_cores=True,
        shapes=((1, 1, 1), *_3D, (16, 16, 32), (16, 24, 24)),
        # Google Cloud names no sizes of it; the names are those of its tool XPK.
        sources=(_TPU_DOCS + "tpu7x", "https://github.com/AI-Hypercomputer/xpk"),
    ),
    # Each GPU has a network adapter of its own.
    _gpu("a100", 2039e9, 312e12, 600e9 / 2, 200e9 / 8, _NVIDIA + "a100", _DGX + "dgxa100"),
    _gpu("h100", 3350e9, 989e12, 900e9 / 2, 400e9 / 8, _NVIDIA + "h100", _DGX + "dgxh100"),
    _gpu("h800", 3350e9, 989e12, 400e9 / 2, 400e9 / 8, "https://arxiv.org/abs/2505.09343"),
    _gpu("h200", 4800e9, 989e12, 900e9 / 2, 400e9 / 8, _NVIDIA + "h200", _DGX + "dgxh100"),
    _gpu("b200", 8000e9, 2250e12, 1800e9 / 2, 400e9 / 8, _NVIDIA + "dgx-b200", _DGX + "dgxb200"),
)


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips of one slice, or of several equal ones.

    Attributes:
      chip: their kind.
      shape: chips of a slice along each dimension of its torus; of a cluster of GPUs, its hosts and
        the GPUs of each.
      slices: or clusters of GPUs.
    """

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        """Of all slices."""
        return self.slices * math.prod(self.shape)

    @property
    def devices(self) -> int:
        """Of all slices."""
        return self.chips * self.chip.devices

    @property
    def slice_name(self) -> str:
        """The name of one slice by its chips along each dimension, for TPUs as libtpu writes it."""
        return f"{self.chip.compiler}:{_text(self.shape)}"

    @property
    def code(self) -> str:
        """By chips along each dimension, such as 2*v4:8x8x8 or h100:8x8."""
        return f"{self._several}{self.slice_name}"

    @property
    def name(self) -> str:
        """By Google Cloud's number, such as tpu-v4-1024; `code` where it stands for another shape."""
        gpus = math.prod(self.shape)
        usual = (
            self.shape == _hosts(self.chip, gpus)
            if self.chip.gpu
            else self.shape in self.chip.shapes
        )
        if not usual:
            return self.code
        return f"{self._several}{self.chip.name}-{self.chip.number(self.shape)}"

    @property
    def _several(self) -> str:
        return f"{self.slices}*" if self.slices > 1 else ""

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Along which dimensions the last chip is linked to the first.

        In a torus of three, optical switches close all of them if the slice is made of cubes of 4 x 4 x
        4; in one of two, only a dimension as long as the whole pod is closed.
        https://cloud.google.com/tpu/docs/v4 and https://jax-ml.github.io/scaling-book/tpus/
        """
        if self.chip.torus == 3:
            return (all(length % 4 == 0 for length in self.shape),) * 3
        pod = max(self.chip.shapes[-1]) if self.chip.torus else 0
        return tuple(length == pod for length in self.shape)


def topology(text: str) -> Topology:
    """Reads a machine, as it is written in the description of this module.

    Raises:
      UserError: no such machine exists.
    """
    found = re.fullmatch(
        r"(?:([1-9]\d*)\*)?(?:(\w+):(\d+(?:x\d+)*)|([\w-]+)-(\d+))", text, re.ASCII
    )
    by_name = {name: chip for chip in CHIPS for name in (chip.name, chip.compiler) if name}
    chip = by_name.get(found[2] or found[4]) if found else None
    if found is None or chip is None:
        raise UserError(
            f"topology is {text!r}; write it as tpu-v4-1024, v4:8x8x8, gpu-h100-64, h100:8x8 or, for two "
            f"slices, 2*tpu-v5e-256; the chips are {', '.join(chip.name for chip in CHIPS)}."
        )
    slices = int(found[1] or 1)
    if chip.gpu and not found[3]:
        shape: tuple[int, ...] = _hosts(chip, int(found[5]))
        if math.prod(shape) != int(found[5]) or not all(shape):
            raise UserError(
                f"topology is {text!r}; write {chip.name}- and a number of GPUs up to "
                f"{chip.chips_per_host} or a multiple of {chip.chips_per_host}, such as {chip.name}-64, or "
                f"the hosts and the GPUs of each, {chip.compiler}:8x8."
            )
    elif found[3]:
        shape = tuple(map(int, found[3].split("x")))
        _check_shape(chip, text, shape)
    else:
        shapes = {chip.number(shape): shape for shape in chip.shapes}
        if int(found[5]) not in shapes:
            what = "cores" if chip.counts_cores else "chips"
            raise UserError(
                f"topology is {text!r}; the number of {what} of a {chip.name} is one of "
                f"{', '.join(map(str, shapes))}, and other slices are written by their chips along "
                f"each dimension, such as {chip.compiler}:{_text(chip.shapes[-1])}."
            )
        shape = shapes[int(found[5])]
    return Topology(chip, shape, slices)


def _hosts(chip: Chip, gpus: int) -> tuple[int, int]:
    """Hosts of full size, or one that has fewer, and the GPUs of each: too many if it does not divide."""
    return -(-gpus // chip.chips_per_host), min(gpus, chip.chips_per_host)


def _check_shape(chip: Chip, text: str, shape: tuple[int, ...]) -> None:
    if chip.gpu:
        if len(shape) != 2 or not all(shape) or shape[1] > chip.chips_per_host:
            raise UserError(
                f"topology is {text!r}; of {chip.name} write the hosts and the GPUs of each, at most "
                f"{chip.chips_per_host}, such as {chip.compiler}:8x8."
            )
        return
    largest = chip.shapes[-1]
    if len(shape) != chip.torus or not all(shape):
        raise UserError(
            f"topology is {text!r}; a {chip.name} has {chip.torus} dimensions of at least one chip, "
            f"such as {chip.compiler}:{_text(largest)}."
        )
    if math.prod(shape) > math.prod(largest):
        raise UserError(
            f"topology is {text!r}, which has {math.prod(shape)} chips; the largest slice of "
            f"{chip.name} is {chip.compiler}:{_text(largest)}, and several of them are written "
            f"2*{chip.compiler}:{_text(largest)}."
        )


def _text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def describe(topology: Topology) -> list[jax.Device]:
    """Devices of a machine that need not be here: programs can be compiled for them, not run.

    Starts no backend. Do not call it before training in the same process: it loads libtpu, told not to
    look for TPUs or for other processes that use it, or XLA's plugin for CUDA, told not to look for CUDA,
    unless they are loaded already.

    Raises:
      NoCompilerError: see there.
      UserError: the compiler knows no such machine.
    """
    return _gpus(topology) if topology.chip.gpu else _tpus(topology)


def _gpus(topology: Topology) -> list[jax.Device]:
    if not xla_client.pjrt_plugin_loaded("cuda"):
        os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    gpu, shape = topology.chip.gpu, _text((topology.slices, *topology.shape))
    assert gpu is not None
    try:
        return topologies.get_topology_desc(
            platform="cuda", target_config=gpu.description, topology=shape
        ).devices
    except NotImplementedError as error:
        raise NoCompilerError(
            f"topology is {topology.name}, which XLA's plugin for CUDA compiles for and it is not "
            f"installed; {GPU_COMPILER}."
        ) from error


def _tpus(topology: Topology) -> list[jax.Device]:
    if not xla_client.pjrt_plugin_loaded("tpu"):
        # It would ask Google Cloud's metadata server, at length where there is none; take a lock that
        # keeps other processes from compiling; and warn that it finds neither a host nor its TPUs.
        os.environ["TPU_SKIP_MDS_QUERY"] = "1"
        os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v4-8")  # Programs do not depend on it.
    width, height = (*topology.shape, 1)[:2]
    options: dict[str, Any] = {
        # A host has a square of four chips, or all of a smaller slice.
        "chips_per_host_bounds": (min(width, 2), min(height, 2), 1),
        "wrap": (*topology.wraps, False, False)[:3],
        "num_slices": topology.slices,
    }
    if topology.chip.cores > topology.chip.devices:
        options["chip_config_name"] = "megacore"
    try:
        return topologies.get_topology_desc(topology.slice_name, "tpu", **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"topology is {topology.name}, which libtpu does not know "
            f"({' '.join(str(error).split()).rstrip('.')}); give the name of a rented slice, such as "
            "tpu-v4-1024."
        ) from error
    except RuntimeError as error:
        raise NoCompilerError(
            f"topology is {topology.name}, which libtpu compiles for and it is not installed; run "
            "make install EXTRA=tpu on Linux on x86_64."
        ) from error
