"""Every test runs on 8 host devices, with compiled programs kept between runs."""

import os
import pathlib

import jax
import pytest
from hypothesis import settings

from moe_jax import huge_pages
from tests import shapes

shapes.install()  # Before anything that it checks is imported.

# Before the backend starts: configuration, not environment, so that subprocesses choose their own.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
# Tests compile much and compute little: 345 s of user time become 243 s for the core's tests.
jax.config.update("jax_disable_most_optimizations", True)
# Scripts that tests start need not start again for it.
os.environ |= huge_pages.environment()
# The same for what cannot be configured, and in subprocesses, too: 82 s of user time become 44 s for
# the routers' tests. Later versions have no other emitters, and end at an unknown flag.
_FLAGS = ["--xla_cpu_parallel_codegen_split_count=1"]
if jax.__version_info__ < (0, 11):
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_FLAGS]).strip()
_CACHE = pathlib.Path(__file__).parent.parent / ".jax_cache"
jax.config.update(
    "jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


# CI tries the same examples in every run; elsewhere every run tries new ones.
settings.register_profile("ci", derandomize=True, deadline=None)
if os.environ.get("CI"):
    settings.load_profile("ci")


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder in which python_library is prepared once per session."""
    from moe_jax.data.sources import prepare_dataset

    folder = tmp_path_factory.mktemp("tensorflow_datasets")
    prepare_dataset("python_library", str(folder))
    return str(folder)


# A worker that took one of these folders' long files last would end minutes after the others; `make
# test` lets pytest-xdist give out files in this order.
_FIRST = ["reproduction", "training", "families", "experiments"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts by folder: those that take longest first, the others as they are."""
    folders = [pathlib.Path(__file__).parent / name for name in _FIRST]

    def rank(item: pytest.Item) -> int:
        return folders.index(item.path.parent) if item.path.parent in folders else len(folders)

    items.sort(key=rank)
