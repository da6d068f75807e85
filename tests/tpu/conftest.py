"""Meshes of TPUs that are not there: libtpu compiles for them on any Linux x86-64 machine."""

import os

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from moe_jax.parallel.mesh import AXES

# v5p with the two cores of a chip as one device.
TOPOLOGIES = {"v5p:2x2x1": {"chip_config_name": "megacore"}, "v6e:2x2": {}}


@pytest.fixture(scope="session")
def compiler_settings() -> None:
    """Undoes what makes the other tests fast; these run in a process of their own."""
    # There is no metadata server to wait for; libtpu reads this when it is loaded.
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    jax.config.update("jax_disable_most_optimizations", False)
    jax.config.update("jax_enable_compilation_cache", False)  # It asks for a TPU to load into.


@pytest.fixture(scope="module", params=TOPOLOGIES)
def tpu_mesh(request: pytest.FixtureRequest, compiler_settings: None) -> Mesh:
    """Four TPUs along `expert`."""
    description = topologies.get_topology_desc(
        platform="tpu", topology_name=request.param, **TOPOLOGIES[request.param]
    )
    devices = np.array(description.devices).reshape(1, 4, 1)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 3)
