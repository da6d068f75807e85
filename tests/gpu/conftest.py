"""GPUs that are not there: XLA's plugin for CUDA compiles for them on any Linux machine."""

import jax
import pytest
from absl import flags

from moe_jax.pods.hardware import describe, topology


@pytest.fixture(scope="session", autouse=True)
def compiler_settings():
    """Undoes what makes the other tests fast, and finds the plugin before it looks for CUDA."""
    jax.config.update("jax_disable_most_optimizations", False)
    jax.config.update("jax_enable_compilation_cache", False)  # It asks for a GPU to load into.
    describe(topology("h100:1x1"))
    flags.FLAGS.mark_as_parsed()  # tokamax would take pytest's arguments for its own.
