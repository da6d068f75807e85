"""Where a result comes from: versions, commit, devices."""

import os
import pathlib
import platform
import subprocess
import sys
from importlib import metadata
from typing import Any

import jax

_PACKAGES = ("moe_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


# What JAX computes depends on these: other draws, other dtypes, other products.
_JAX_SETTINGS = (
    "jax_enable_x64", "jax_default_prng_impl", "jax_threefry_partitionable",
    "jax_default_matmul_precision", "jax_numpy_dtype_promotion",
)  # fmt: skip
# The last bits depend on these, but they belong to a machine, and a run may move to another one.
_FLAG_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
_FLAGS_OF_NO_NUMBER = ("--xla_force_host_platform_device_count", "--xla_dump")


def numerics() -> dict[str, Any]:
    """The settings of JAX and flags of XLA that change what a config computes."""
    words = [word for name in _FLAG_VARIABLES for word in os.environ.get(name, "").split()]
    flags = sorted({word for word in words if not word.startswith(_FLAGS_OF_NO_NUMBER)})
    return {**{name: getattr(jax.config, name, None) for name in _JAX_SETTINGS}, "flags": flags}


def record() -> dict[str, Any]:
    """Package versions, the checkout's commit (None outside git), numerical settings, the devices."""
    return {
        "versions": {
            "python": sys.version.split()[0],
            **{name: metadata.version(name) for name in _PACKAGES},
        },
        "commit": commit(),
        "numerics": numerics(),
        "device_kind": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
        "process_count": jax.process_count(),
    }


def devices() -> str:
    """The devices in words, such as '8 x cpu (cpu)' or '8 x cpu (cpu) of 2 processes'."""
    first = jax.devices()[0]
    words = f"{jax.device_count()} x {first.device_kind} ({first.platform})"
    return words if jax.process_count() == 1 else f"{words} of {jax.process_count()} processes"


def commit() -> str | None:
    """The commit of the checkout this package runs from, '+changes' if files differ from it.

    None for an installed package, also where it is installed inside another project's checkout.
    """
    root = pathlib.Path(__file__).parent
    git = ["git", "-C", str(root)]
    try:
        subprocess.run(
            [*git, "ls-files", "--error-unmatch", __file__], capture_output=True, check=True
        )
        head = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+changes" if changed else "")


def machine() -> str:
    """The processor and its cores in words, and the accelerator if there is one."""
    model = platform.processor() or platform.machine()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    cores = f"{os.cpu_count()} cores of {model}"
    return cores if jax.default_backend() == "cpu" else f"{devices()} and {cores}"
