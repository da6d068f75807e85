"""Saves a model as Hugging Face's, one tensor at a time."""

import collections
import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from moe_jax.errors import UserError
from moe_jax.interop.huggingface import files, matching, ties
from moe_jax.interop.huggingface.expressible import check_expressible
from moe_jax.interop.huggingface.families import family_named
from moe_jax.interop.huggingface.files import Written
from moe_jax.interop.huggingface.layout import Region, overlap, size_of, within
from moe_jax.interop.huggingface.loading import BLOCK_BYTES
from moe_jax.interop.huggingface.table import Tensor
from moe_jax.models.abstract_model import arrays_of


def save(
    model: Any,
    family: str,
    folder: os.PathLike[str] | str,
    further: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes config.json and safetensors files; the folder appears once it is complete.

    Args:
      model: with its config; on devices of this process.
      family: as `model_type` in config.json names it, such as mixtral.
      folder: must not exist.
      further: fields of config.json that our configs do not have, such as eos_token_id; those that
        make it another model are refused.
      max_shard_bytes: see `files.write_folder`.

    Raises:
      UserError: the family has no such model, or the folder exists.
    """
    if jax.process_count() > 1:
        raise UserError(
            f"there are {jax.process_count()} processes, but saving for Hugging Face needs all of the "
            "model in one; load the run's checkpoint in a single process."
        )
    if getattr(model.config, "target_vocab_size", 0):
        raise UserError(
            f"model.target_vocab_size is {model.config.target_vocab_size}, which gives the targets a "
            f"table of their own; transformers 4 has one for both stacks of a {family}, so that it "
            "cannot be written."
        )
    chosen = family_named(family)
    hf = {**chosen.config_to_hf(model.config), **(further or {})}
    copies = chosen.copies(model.config)
    again = chosen.config_from_hf(hf)
    if ties.HEAD in copies:  # Of two equal tables config.json does not say that they are one.
        again = dataclasses.replace(again, tied=True)
    check_expressible(family, model.config, again)
    arrays = {
        path: array
        for tree in arrays_of(model)
        for path, array in zip(matching.paths(tree), jax.tree.leaves(tree), strict=True)
    }
    shapes = {path: array.shape for path, array in arrays.items()}
    tensors = matching.tensors_of_leaves(chosen, model.config, shapes)
    names = collections.defaultdict(list)
    for name, copied in copies.items():
        names[copied].append(name)
    written = [
        Written(
            name,
            tensor.layout.their_shape(tensor.shape(array.shape)),
            np.dtype(array.dtype),
            functools.partial(_tensor_of, tensor, array),
        )
        for path, array in arrays.items()
        for tensor in tensors[path]
        for name in (tensor.name, *names[tensor.name])
    ]
    written.sort(key=lambda tensor: tensor.name)
    files.write_folder(folder, hf, written, max_shard_bytes)


def _tensor_of(tensor: Tensor, array: jax.Array) -> np.ndarray:
    """A tensor as it is there, from the devices that hold its parts."""
    filled = tensor.part(array.shape)
    ours = np.empty([size_of(s) for s in filled], array.dtype)
    for shard in array.addressable_shards:
        held = tuple(
            slice(*s.indices(size)[:2]) for s, size in zip(shard.index, array.shape, strict=True)
        )
        common = overlap(filled, held)
        if common is None or shard.replica_id:
            continue
        ours[within(common, filled)] = _part_of(shard.data, within(common, held))
    return tensor.layout.write(ours.reshape(tensor.shape(array.shape)))


def _part_of(array: jax.Array, part: Region) -> np.ndarray:
    """A part of one device's array; only a small array comes to the host whole."""
    if array.nbytes <= BLOCK_BYTES:
        return np.asarray(array)[part]
    start = np.array([s.start for s in part], np.int32)
    return np.asarray(_cut(array, start, tuple(map(size_of, part))))


@functools.partial(jax.jit, static_argnums=2)
def _cut(array: jax.Array, start: jax.Array, sizes: tuple[int, ...]) -> jax.Array:
    return jax.lax.dynamic_slice(array, start, sizes)
