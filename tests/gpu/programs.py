"""How the tests of this folder compile, and what they look for in the text of a program."""

import re
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_jax.parallel.mesh import MeshConfig, mesh_of
from moe_jax.pods.absent_gpu import as_if_here, compile_for
from moe_jax.pods.hardware import describe, topology

MOSAIC, TRITON = "mosaic_gpu_v2", "__gpu$xla.gpu.triton"
CUDNN, CUDNN_BACKWARD = "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"
WHOLE = PartitionSpec()


def gpus(machine: str, **axes: int) -> Mesh:
    """The mesh of all GPUs of a machine, such as h100:1x8."""
    return mesh_of(MeshConfig(**axes), describe(topology(machine)))


def array(mesh: Mesh, dtype: Any, *shape: int, spec: PartitionSpec = WHOLE) -> Any:
    """The shape of a global array, split by `spec`."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def compiled(mesh: Mesh, function: Callable[..., Any], *arrays: Any) -> jax.stages.Compiled:
    """As `compile_pod.py` compiles."""
    with jax.set_mesh(mesh), as_if_here(mesh.devices.flat[0]):
        return compile_for(jax.jit(function).lower(*arrays), "gpu-h100-8")


def kernels(text: str) -> list[str]:
    """Targets of a program's kernels, sorted."""
    found = re.findall(r'custom_call_target="([^"]*)"', text)
    return sorted(one for one in found if one in (MOSAIC, TRITON, CUDNN, CUDNN_BACKWARD))


def of_all_rows_and_groups(text: str, groups: int, rows: int) -> list[str]:
    """Arrays of [groups, rows, width], as products of all rows with all groups have them."""
    return re.findall(rf"\w+\[{groups},{rows},\d\d+\]", text)
