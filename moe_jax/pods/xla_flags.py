"""Compiler flags for a machine, for scripts that start runs.

    LIBTPU_INIT_ARGS="$(python -m moe_jax.pods.xla_flags 2*tpu-v5e-256)"; export LIBTPU_INIT_ARGS
    XLA_FLAGS="$(python -m moe_jax.pods.xla_flags gpu-h100-64)"; export XLA_FLAGS

TPUs read LIBTPU_INIT_ARGS and refuse a flag they do not know; GPUs read XLA_FLAGS. A machine is named
as in `moe_jax.pods.hardware`.

Of one small MoE, libtpu 0.0.42 compiles the same program for TPU v5p with and without
xla_enable_async_all_gather=true, xla_tpu_enable_async_collective_fusion=true (with its _fuse_all_gather
and _multiple_steps), xla_tpu_overlap_compute_collective_tc=true and
xla_tpu_megacore_fusion_allow_ags=true, which are therefore not here. Recipes for TPU v5p set most of
these, but MaxText's the last one to false, which was not tried; and beside the SparseCores
_fuse_all_gather is set to false below. Of the flags for GPUs, XLA of jaxlib 0.12 still reads those that
pipeline collectives, but has nothing that they could set. The flags are a start; what is best depends on the model, and
only a profile on the machine tells.
"""

import dataclasses
import sys

from moe_jax.command_line import report_to_user
from moe_jax.errors import UserError
from moe_jax.pods.hardware import topology

_JAX_FLAGS = "https://docs.jax.dev/en/latest/xla_flags.html"
_JAX_TESTS = "https://github.com/jax-ml/jax/blob/main/tests/overlap_test.py"
_MAXTEXT = "https://github.com/AI-Hypercomputer/maxtext/blob/main/benchmarks/xla_flags_library.py"
_NVIDIA = "https://docs.nvidia.com/jax-toolbox/performance-profiling/gpu-performance"


@dataclasses.dataclass(frozen=True)
class XlaFlag:
    """One flag.

    Attributes:
      name: without the dashes.
      value: as it is written.
      why: what it is good for.
      source: address of who says so.
    """

    name: str
    value: str
    why: str
    source: str

    def __str__(self) -> str:
        return f"--{self.name}={self.value}"


def _true(name: str, why: str, source: str) -> XlaFlag:
    return XlaFlag(name, "true", why, source)


_EVERY_TPU = (
    _true(
        "xla_tpu_enable_async_all_to_all",
        "tokens travel to their experts while the device computes; libtpu 0.0.42 waits otherwise",
        _JAX_TESTS,
    ),
)
_SPARSE_CORES = (
    _true(
        "xla_tpu_enable_sparse_core_collective_offload_all_gather",
        "the SparseCores gather parameters, so that the TensorCore is free",
        _MAXTEXT,
    ),
    _true(
        "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter",
        "the SparseCores add up gradients of split parameters",
        _JAX_TESTS,
    ),
    _true(
        "xla_tpu_enable_sparse_core_collective_offload_all_reduce",
        "the SparseCores add up gradients of whole parameters",
        _MAXTEXT,
    ),
    XlaFlag(
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
        "false",
        "an all-gather is either fused with the TensorCore's products or the SparseCores' work",
        _MAXTEXT,
    ),
    _true(
        "xla_tpu_use_tc_device_shape_on_sc",
        "both kinds of cores agree on the layout of what they exchange",
        _MAXTEXT,
    ),
    _true(
        "xla_sc_disable_megacore_partitioning",
        "MaxText sets it with the two above",
        _MAXTEXT,
    ),
)
_OF_CHIP = {
    "tpu-v6e": (
        *_SPARSE_CORES,
        XlaFlag(
            "xla_tpu_scoped_vmem_limit_kib",
            "81920",
            "80 of 128 MiB of VMEM for the operation at hand, the rest to fetch for the next ones",
            _MAXTEXT,
        ),
    ),
    "tpu7x": _SPARSE_CORES,
}
_SEVERAL_SLICES = (
    _true(
        "xla_tpu_enable_data_parallel_all_reduce_opt",
        "sums of gradients between slices overlap with the backward pass",
        _JAX_FLAGS,
    ),
    _true(
        "xla_tpu_data_parallel_opt_different_sized_ops",
        "the same where gradients differ in size from what they are stacked in; takes memory",
        _JAX_FLAGS,
    ),
)
_EVERY_GPU = (
    _true(
        "xla_gpu_enable_latency_hiding_scheduler",
        "collectives start as early and are waited for as late as possible",
        _NVIDIA,
    ),
    _true(
        "xla_gpu_enable_pipelined_all_gather",
        "parameters of the next block are gathered while this one is computed",
        _JAX_FLAGS,
    ),
    _true(
        "xla_gpu_enable_pipelined_reduce_scatter",
        "gradients of the last block are added up while this one's are computed",
        _JAX_FLAGS,
    ),
    _true(
        "xla_gpu_enable_pipelined_all_reduce",
        "the same for parameters that every device has whole",
        _JAX_FLAGS,
    ),
    _true(
        "xla_gpu_enable_while_loop_double_buffering",
        "a loop over blocks needs two buffers for what is pipelined, or it copies",
        _JAX_FLAGS,
    ),
)


def flags_for(machine: str) -> tuple[XlaFlag, ...]:
    """Flags for a machine, which should not be set on another kind.

    Args:
      machine: as `moe_jax.pods.hardware.topology` reads it.

    Raises:
      UserError: no such machine.
    """
    found = topology(machine)
    if found.chip.platform == "gpu":
        return _EVERY_GPU
    between_slices = _SEVERAL_SLICES if found.slices > 1 else ()
    return (*_EVERY_TPU, *_OF_CHIP.get(found.chip.name, ()), *between_slices)


def main() -> None:
    """Prints the flags for the machine that is the only argument, on one line."""
    if len(sys.argv) != 2:
        raise UserError("name one machine: python -m moe_jax.pods.xla_flags tpu-v5p-128.")
    print(" ".join(map(str, flags_for(sys.argv[1]))))


if __name__ == "__main__":
    report_to_user(main)
