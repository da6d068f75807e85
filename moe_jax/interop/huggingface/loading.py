"""Loads a folder of Hugging Face's onto a mesh.

Each device gets its part of a parameter straight from the files, in blocks of bounded size: neither
a whole parameter nor a whole file is ever in the host's memory.
"""

import collections
import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from moe_jax.errors import UserError
from moe_jax.interop.huggingface import files, matching
from moe_jax.interop.huggingface.families import family_of
from moe_jax.interop.huggingface.files import Stored
from moe_jax.interop.huggingface.layout import Region, overlap, size_of, within
from moe_jax.interop.huggingface.original import original
from moe_jax.interop.huggingface.table import Tensor
from moe_jax.interop.huggingface.tokenizer import FolderTokenizer
from moe_jax.models.abstract_model import AbstractModel
from moe_jax.models.decoder_lm import DecoderLM
from moe_jax.models.encoder_decoder import EncoderDecoder
from moe_jax.parallel.mesh import MeshConfig
from moe_jax.parallel.sharding import parameter_shardings

# What is read at once. A device's part of a parameter that is no larger is put together on the host,
# because a program that writes into it would have to be compiled for every shape.
BLOCK_BYTES = 2 * 2**20


def folder_named(checkpoint: str) -> str:
    """The folder of a checkpoint that is written as hf:PATH.

    Raises:
      UserError: it is written otherwise.
    """
    library, _, folder = checkpoint.partition(":")
    if library != "hf" or not folder:
        raise UserError(f"checkpoint is {checkpoint!r}; write it as hf:PATH.")
    return folder


def load(
    folder: os.PathLike[str] | str,
    mesh: Mesh,
    dtype: Any = None,
    fsdp_min_size: int = MeshConfig.fsdp_min_size,
) -> Any:
    """A model with the numbers of a folder.

    Args:
      folder: with config.json and safetensors files.
      mesh: over which the model is spread.
      dtype: of all parameters; None for those of the files. What is no parameter (the experts'
        biases of DeepSeek-V3) stays as precise as the model has it.
      fsdp_min_size: see `MeshConfig`.

    Raises:
      UserError: the folder is damaged, its model is not supported, or the mesh does not divide it.
    """
    hf = files.read_config(folder)
    family = family_of(hf)
    config = family.config_from_hf(hf)
    stored = original(family, files.tensors_of(folder))
    tables = family.tables(config, stored)
    config = tables.config
    _check_size(config, len(stored), folder)
    config.validate()
    abstract_model = AbstractModel.of(config)
    trees = (
        (abstract_model.shapes, abstract_model.axes),
        (abstract_model.variable_shapes, abstract_model.variable_axes),
    )
    shapes = {
        path: leaf.shape
        for tree, _ in trees
        for path, leaf in zip(matching.paths(tree), jax.tree.leaves(tree), strict=True)
    }
    tensors = matching.tensors_of_leaves(family, config, shapes)
    matching.check_stored(family, tensors, shapes, stored, tables, folder)
    stored = {**stored, **{name: stored[there] for name, there in tables.sources.items()}}

    def loaded(tree: Any, axes: Any, dtype_of: Callable[[str, Any], Any]) -> Any:
        """A tree of arrays; `dtype_of` a path and leaf is None for its file's."""

        def leaf_loaded(path: tuple[Any, ...], leaf: Any, sharding: NamedSharding) -> jax.Array:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            chosen = dtype_of(name, leaf)
            return _load_leaf(name, leaf.shape, sharding, tensors[name], stored, chosen)

        shardings = parameter_shardings(tree, axes, mesh, fsdp_min_size)
        return jax.tree.map_with_path(leaf_loaded, tree, shardings)

    parameters, variables = trees
    half = dtype is not None and np.dtype(dtype) == np.float16
    kept = family.not_in_float16 if half else ()
    return abstract_model.merge(
        loaded(*parameters, lambda name, _: None if name.endswith(kept) else dtype),
        # Experts' biases differ by less than 16 bits show.
        loaded(*variables, lambda _, leaf: leaf.dtype),
    )


def _check_size(config: Any, tensors: int, folder: Any) -> None:
    """Refuses a config of far more layers or experts than a folder can have, before it is built.

    Raises:
      UserError: every layer and expert has tensors, but there are fewer.
    """
    stacks = (config.encoder, config.decoder) if hasattr(config, "encoder") else (config,)
    for stack in stacks:
        sparse = len(stack.moe_layers)
        if stack.num_layers + sparse * stack.num_experts > tensors:
            raise UserError(
                f"config.json of {folder} has {stack.num_layers} layers, {sparse} of them with "
                f"{stack.num_experts} experts, but the folder has {tensors} tensors; they do not belong "
                "together."
            )


def load_with_tokenizer(
    folder: os.PathLike[str] | str, mesh: Mesh, dtype: Any = None
) -> tuple[DecoderLM | EncoderDecoder, FolderTokenizer]:
    """A model of texts and the tokenizer of its folder, to generate with.

    Args:
      folder, mesh, dtype: see `load`.

    Raises:
      UserError: see `load`; or the folder has no tokenizer, or a model that generates no texts.
    """
    tokenizer = FolderTokenizer.load(folder)
    model = load(folder, mesh, dtype)
    if not isinstance(model, DecoderLM | EncoderDecoder):
        raise UserError(
            f"{folder} holds a {type(model).__name__}, which generates no texts; name a folder of a "
            "decoder or of an encoder and decoder."
        )
    return model, tokenizer


def _load_leaf(
    path: str,
    shape: tuple[int, ...],
    sharding: NamedSharding,
    tensors: Sequence[Tensor],
    stored: Mapping[str, Stored],
    dtype: Any,
) -> jax.Array:
    """One parameter from its tensors.

    Raises:
      UserError: they have several dtypes and none was chosen.
    """
    dtypes = {stored[tensor.name].dtype for tensor in tensors}
    if dtype is None and len(dtypes) > 1:
        raise UserError(
            f"the tensors of parameter {path} have dtypes {', '.join(sorted(map(str, dtypes)))}; "
            "choose one with dtype."
        )
    chosen = np.dtype(dtypes.pop() if dtype is None else dtype)
    # Devices that hold the same part get it by one reading.
    holders = collections.defaultdict(list)
    for device, index in sharding.devices_indices_map(shape).items():
        if device in sharding.addressable_devices:
            bounds = (part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
            holders[tuple(bounds)].append(device)
    arrays = []
    for held, devices in holders.items():
        part = tuple(slice(*bound) for bound in held)
        blocks = (
            (place, _converted(block, chosen, stored[tensor.name]))
            for tensor in tensors
            for place, block in _blocks(tensor, shape, part, stored[tensor.name])
        )
        arrays += _placed(blocks, tuple(map(size_of, part)), chosen, devices)
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _converted(block: np.ndarray, dtype: np.dtype, stored: Stored) -> np.ndarray:
    """A block in the dtype of its parameter.

    Raises:
      UserError: it has numbers that are none, before or because of that.
    """
    with np.errstate(over="ignore"):  # It is said below.
        converted = block.astype(dtype, copy=False)
    if not np.isfinite(converted).all():
        reason = (
            f"has numbers that {dtype} does not have; choose another dtype"
            if np.isfinite(block).all()
            else "has numbers that are not finite; save the model again from before that"
        )
        raise UserError(f"tensor {stored.name} of {stored.file} {reason}.")
    return converted


def _placed(
    blocks: Iterator[tuple[Region, np.ndarray]],
    shape: tuple[int, ...],
    dtype: np.dtype,
    devices: Sequence[jax.Device],
) -> list[jax.Array]:
    """An array [shape] on each device, put together from blocks of `dtype`, each with its place."""
    if math.prod(shape) * dtype.itemsize <= BLOCK_BYTES:
        whole = np.empty(shape, dtype)
        for place, block in blocks:
            whole[place] = block
        return [jax.device_put(whole, device) for device in devices]
    arrays = [jnp.empty(shape, dtype, device=device) for device in devices]
    for place, block in blocks:
        start = np.array([s.start for s in place], np.int32)
        arrays = [
            _with_block(array, jax.device_put(block, device), start)
            for array, device in zip(arrays, devices, strict=True)
        ]
        # Otherwise blocks would be read, and kept, faster than they are written.
        jax.block_until_ready(arrays)
    return arrays


@functools.partial(jax.jit, donate_argnums=0)
def _with_block(array: jax.Array, block: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice(array, block, start)


def _blocks(
    tensor: Tensor, shape: tuple[int, ...], part: Region, stored: Stored
) -> Iterator[tuple[Region, np.ndarray]]:
    """What of a tensor lies in a part of the parameter [shape].

    Yields:
      a place within the part, and the block that belongs there.
    """
    common = overlap(tensor.part(shape), part)
    if common is None:
        return
    inner = tensor.shape(shape)
    most = BLOCK_BYTES // stored.dtype.itemsize
    for region in tensor.layout.blocks(inner, tensor.without_indices(common), most):
        read = functools.partial(files.read, stored)
        block = tensor.layout.read(read, inner, region)
        place = tensor.with_indices(region, common)
        yield within(place, part), block.reshape([size_of(s) for s in place])
