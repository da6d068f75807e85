"""What a program for GPUs asks of the GPU while it is traced and compiled, answered where none is.

JAX and tokamax look at the default device, which JAX lets us set; JAX's attention by cuDNN asks the library
for its version and the CUDA backend for its GPU, neither of which is there.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import jax
from jax._src.cudnn import fused_attention_stablehlo  # It has no public name.

from moe_jax.pods.gpus import CUDNN
from moe_jax.pods.xla_flags import flags_for

# Both would ask the GPU: which algorithm is fastest, and how much memory a sort by CUB needs.
_WITHOUT_GPU: dict[str, str | bool] = {
    "xla_gpu_autotune_level": "0",
    "xla_gpu_enable_cub_radix_sort": False,
}


def compile_for(lowered: jax.stages.Lowered, machine: str) -> jax.stages.Compiled:
    """Compiles with the launchers' flags, and without asking a GPU.

    Flags that this XLA has as words of the command line only, where they do nothing any more, are left
    out: of those for pipelined collectives it is true with jaxlib 0.12.

    Args:
      lowered: within `as_if_here`.
      machine: as `moe_jax.pods.hardware.topology` reads it.
    """
    # The options of a compilation take booleans, where the command line takes words.
    options: dict[str, str | bool] = {
        flag.name: flag.value == "true" for flag in flags_for(machine)
    }
    while True:
        try:
            return lowered.compile(options | _WITHOUT_GPU)
        except jax.errors.JaxRuntimeError as error:
            unknown = re.search(r"No such compile option: '(\w+)'", str(error))
            if not unknown or options.pop(unknown[1], None) is None:
                raise


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
