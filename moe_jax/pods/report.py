"""What the compiler and the data sheets say of one training step on a machine, ready for JSON."""

import dataclasses
import json
from typing import Any

from etils import epath

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class DeviceMemory:
    """Bytes of a device's memory in one step.

    Attributes:
      arguments: the state and the batch; `parameters`, `optimizer_state` are parts of it.
      outputs: the new state and the metrics.
      aliased: outputs that take the place of arguments.
      temporaries: activations, gradients, buffers; None where the compiler refused and did not say.
      program: the instructions.
      capacity: what the compiler lets a program use; of a GPU what JAX takes of it.
    """

    arguments: int
    parameters: int
    optimizer_state: int
    outputs: int
    aliased: int
    temporaries: int | None
    program: int
    capacity: int

    @property
    def total(self) -> int:
        """All of it; outputs that take the place of arguments count once."""
        return self.arguments + self.outputs - self.aliased + (self.temporaries or 0) + self.program

    @property
    def missing(self) -> int:
        """Bytes by which it does not fit, 0 if it does."""
        return max(self.total - self.capacity, 0)

    @property
    def largest(self) -> str:
        """The term that takes most."""
        terms = {
            "parameters": self.parameters,
            "optimizer state": self.optimizer_state,
            "temporaries (activations, gradients and buffers)": self.temporaries or 0,
        }
        return max(terms, key=lambda name: terms[name])


@dataclasses.dataclass(frozen=True)
class CollectiveSum:
    """All collectives of one kind over the same mesh axes.

    Attributes:
      kind: XLA's name.
      axes: along which the devices that talk differ.
      count: runs in a step.
      bytes: of the results on one device, in a step.
      seconds: in a step, by `moe_jax.pods.roofline`.
      exact: whether all loops around them have a known length.
      synchronous: runs in a step for which a GPU waits, so that nothing overlaps with them; compilers
        for other devices do not say.
    """

    kind: str
    axes: tuple[str, ...]
    count: int
    bytes: int
    seconds: float
    exact: bool
    synchronous: int = 0


@dataclasses.dataclass(frozen=True)
class Terms:
    """The roofline of a step: seconds if one resource were all that mattered, and what follows.

    Attributes:
      compute, memory, interconnect, network: FLOPs at the matrix peak, bytes at the memory's
        bandwidth, collectives over the links within a slice, and between slices or hosts.
      binding: the longest of them.
      step_seconds: its length, an estimate of a step in which all four overlap.
      mfu: algorithmic FLOPs a second over the matrix peak, at `step_seconds`.
      mfu_without_overlap: the same where the four terms follow each other.
      tokens_per_second_per_chip: at `step_seconds`; images for models of images.
    """

    compute: float
    memory: float
    interconnect: float
    network: float
    binding: str
    step_seconds: float
    mfu: float
    mfu_without_overlap: float
    tokens_per_second_per_chip: float


@dataclasses.dataclass(frozen=True)
class PodReport:
    """One training step on one machine; everything is of the global batch, or per device.

    Attributes:
      config: its file.
      changes: config fields that the layout sets.
      note: of the layout.
      topology, hardware: the machine by its shape (v4:8x8x16) and by its number (tpu-v4-2048).
      compiled_for: `tpu`, `gpu`, or `cpu` where the hardware's own compiler was not at hand.
      compiler: its version.
      chips, devices: of the machine; a device is what JAX sees.
      mesh: axis -> size.
      params: number of parameters.
      parameter_dtype, optimizer: as they are kept; the optimizer's name and the dtypes of its state.
      rows_per_step, tokens_per_step, unit: of a global batch; `unit` is token or image.
      hbm: see `DeviceMemory`.
      fits: the compiler accepts it, and the parts of its memory add up to no more than the capacity.
      refusal: what the compiler said if not.
      flops_per_device: that the program executes, kernels for dropless experts as in balance.
      accounted_flops_per_device: the same by `moe_jax.analysis.accounting`.
      algorithmic_flops_per_device: three forward passes in which each token visits its experts once:
        without recomputation, empty slots and masked scores.
      memory_bytes_per_device: over the border of HBM.
      collectives: of the program.
      roofline: None where the compiler refused.
      exact: whether every count is: no loop of unknown length, no branch.
      compile_seconds: time of compilation on this host.
      memory_fraction: the share of a device's memory that is its capacity: less than 1 of a GPU.
    """

    config: str
    changes: dict[str, Any]
    note: str
    topology: str
    hardware: str
    compiled_for: str
    compiler: str
    chips: int
    devices: int
    mesh: dict[str, int]
    params: int
    parameter_dtype: str
    optimizer: str
    rows_per_step: int
    tokens_per_step: int
    unit: str
    hbm: DeviceMemory
    fits: bool
    refusal: str
    flops_per_device: float
    accounted_flops_per_device: float
    algorithmic_flops_per_device: float
    memory_bytes_per_device: float
    collectives: tuple[CollectiveSum, ...]
    roofline: Terms | None
    exact: bool
    compile_seconds: float
    memory_fraction: float = 1.0

    def as_json(self) -> dict[str, Any]:
        """Dicts, lists and scalars."""
        return {
            **dataclasses.asdict(self),
            "hbm_bytes": self.hbm.total,
            "hbm_capacity_bytes": self.hbm.capacity,
        }

    @classmethod
    def read(cls, tree: dict[str, Any]) -> "PodReport":
        """From `as_json`, through JSON."""
        names = {field.name for field in dataclasses.fields(cls)}
        values = {name: value for name, value in tree.items() if name in names}
        collectives = [CollectiveSum(**one) for one in values["collectives"]]
        values["collectives"] = tuple(
            dataclasses.replace(one, axes=tuple(one.axes)) for one in collectives
        )
        values["hbm"] = DeviceMemory(**values["hbm"])
        values["roofline"] = values["roofline"] and Terms(**values["roofline"])
        return cls(**values)

    def write(self, path: epath.Path) -> None:
        """Writes it as JSON, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(json.dumps(self.as_json(), indent=1) + "\n")
        temporary.replace(path)
