"""Which mesh axes each named dimension is split over: one table for parameters and activations.

A parameter names its dimensions (`axes=("embed", "heads", "head")`) and never a mesh axis.
"""

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_jax.errors import UserError
from moe_jax.parallel.mesh import DATA, EXPERT, MODEL, TOKEN_AXES

MeshAxes = str | tuple[str, ...] | None
AnyMesh = Mesh | jax.sharding.AbstractMesh

# Dimensions that are split only to save memory (FSDP): a parameter too small to be worth the
# gathering keeps them whole, and so does one that the mesh does not divide.
FSDP_AXES: dict[str, MeshAxes] = {
    "embed": TOKEN_AXES,
    # Of latent attention's products with compressed vectors, which have no `embed`: whole, they would
    # take 12 GiB of each device for DeepSeek-V3's weights alone.
    "latent": TOKEN_AXES,
}

MESH_AXES: dict[str, MeshAxes] = {
    **FSDP_AXES,
    "layers": None,  # The stacking axis of a repeated period.
    "vocabulary": MODEL,
    "heads": MODEL,
    "head": None,
    "kv_heads": MODEL,
    "positions": None,
    "qkv": None,
    "mlp": MODEL,
    "experts": EXPERT,
    "sublayers": None,  # Of an expert that is a stack of networks.
    "expert_embed": DATA,  # FSDP too, always: the MoE layer gathers it itself.
    "patch": None,
    "channels": None,
    "classes": None,
    "gates": None,
    "units": None,  # Of an LSTM: split, they would be exchanged at every step of time.
    "features": None,  # Of a row of numbers: a handful.
    "router": None,  # Routers are small and needed whole by every shard.
    "norm": None,
    "batch": TOKEN_AXES,
    "length": None,
    "width": None,
}

# Dimensions that count matrices, of every layer of a stage, every expert, every network of an expert,
# of queries, keys and values: to whoever treats matrices one by one (optimizers), each is one alone.
STACKING_AXES = frozenset({"layers", "experts", "sublayers", "qkv"})


def partition_spec(axes: Sequence[str]) -> PartitionSpec:
    """The PartitionSpec of an array whose dimensions are named `axes`.

    Raises:
      UserError: a name is not in the table (a silent replication would hide a typo).
    """
    for name in axes:
        if name not in MESH_AXES:
            raise UserError(
                f"dimension name {name!r} is not in moe_jax.parallel.sharding.MESH_AXES; "
                f"use one of {', '.join(MESH_AXES)} or add it there."
            )
    return PartitionSpec(*(MESH_AXES[name] for name in axes))


def parameter_spec(
    name: str, shape: Sequence[int], axes: Sequence[str], mesh: AnyMesh, fsdp_min_size: int
) -> PartitionSpec:
    """The PartitionSpec of one parameter; `name` is what an error calls it.

    Raises:
      UserError: a dimension is not divisible by the mesh axes it is split over.
    """
    stacked = axes[1:] if axes[0] == "layers" else axes
    elements = math.prod(shape[len(axes) - len(stacked) :])
    spec = list(partition_spec(axes))
    whole = elements < fsdp_min_size
    for position, (size, axis) in enumerate(zip(shape, axes, strict=True)):
        if axis in FSDP_AXES:
            spec[position] = None if whole else _fsdp_axes(size, axis, mesh)
            whole = whole or spec[position] is not None  # A mesh axis splits one dimension only.
        shards = axis_size(mesh, spec[position])
        if size % shards:
            raise UserError(
                f"parameter {name} has {size} along its {axis!r} dimension, which is not divisible "
                f"by the {shards} devices of mesh axes {spec[position]}; change one of them."
            )
    return PartitionSpec(*spec)


def _fsdp_axes(size: int, axis: str, mesh: AnyMesh) -> MeshAxes:
    """Those mesh axes of an FSDP dimension that divide it into the most parts; None if none does.

    1,024 rows lie whole on 2,048 expert-parallel devices, and 1,280 on 512 = 2 x 256 in 256 parts.
    """
    every = FSDP_AXES[axis]
    names = (every,) if isinstance(every, str) else every or ()
    choices = [chosen for n in range(len(names), 0, -1) for chosen in combinations(names, n)]
    return max(
        (chosen for chosen in choices if size % axis_size(mesh, chosen) == 0),
        key=lambda chosen: axis_size(mesh, chosen),
        default=None,
    )


def axis_size(mesh: AnyMesh, axes: MeshAxes) -> int:
    """Number of shards made by splitting over `axes`."""
    names = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(mesh.shape[name] for name in names)


def parameter_shardings(shapes: Any, axes: Any, mesh: AnyMesh, fsdp_min_size: int) -> Any:
    """NamedShardings of a tree of parameters.

    Args:
      shapes: tree of arrays or ShapeDtypeStructs.
      axes: the same tree with a tuple of dimension names at each leaf.
      mesh: the mesh.
      fsdp_min_size: see `MeshConfig`.
    """

    def one(path: tuple[Any, ...], leaf: Any, names: Sequence[str]) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, parameter_spec(name, leaf.shape, names, mesh, fsdp_min_size))

    return jax.tree.map_with_path(one, shapes, axes)


def constrain(x: jax.Array, *axes: str) -> jax.Array:
    """Asks the compiler to lay out activation `x` by its dimension names; no-op without a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes))
