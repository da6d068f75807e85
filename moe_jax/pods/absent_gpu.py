"""What a program for GPUs asks of the GPU while it is traced and compiled, answered where none is.

JAX and tokamax look at the default device, which JAX lets us set; JAX's attention by cuDNN asks the library
for its version and the CUDA backend for its GPU, neither of which is there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import jax
from jax._src.cudnn import fused_attention_stablehlo  # It has no public name.

from moe_jax.pods.gpus import CUDNN
from moe_jax.pods.xla_flags import flags_for

# Both would ask the GPU: which algorithm is fastest, and how much memory a sort by CUB needs.
_WITHOUT_GPU = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_cub_radix_sort": False}


def compiler_options(machine: str) -> dict[str, Any]:
    """For `jax.stages.Lowered.compile`: the launchers' flags, and what keeps XLA from asking a GPU.

    Args:
      machine: as `moe_jax.pods.hardware.topology` reads it.
    """
    # The options of a compilation take booleans, where the command line takes words.
    return {flag.name: flag.value == "true" for flag in flags_for(machine)} | _WITHOUT_GPU


@contextmanager
def as_if_here(device: jax.Device) -> Iterator[None]:
    """Lets programs be traced and lowered for this GPU, with the newest cuDNN of requirements.lock."""
    capability = tuple(map(int, device.compute_capability.split(".")))

    def at_least(wanted: str) -> bool:
        return capability >= tuple(map(int, wanted.split(".")))

    def equal(wanted: str) -> bool:
        return capability == tuple(map(int, wanted.split(".")))

    major, minor, patch = CUDNN
    with (
        jax.default_device(device),
        mock.patch.multiple(
            fused_attention_stablehlo,
            check_cudnn_version=lambda: 10_000 * major + 100 * minor + patch,
            check_compute_capability=at_least,
            is_cuda_compute_capability_equal=equal,
        ),
    ):
        yield
