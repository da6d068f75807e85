"""Runs a script as a user does."""

import os
import pathlib
import subprocess
import sys

import jax

ROOT = pathlib.Path(__file__).parents[1]


def environment() -> dict[str, str]:
    """Compiles as the tests do, and keeps what is compiled."""
    return {
        **os.environ, "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"
    }  # fmt: skip


def script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, f"experiments/{name}.py", *arguments],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
