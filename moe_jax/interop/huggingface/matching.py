"""Which tensors are which parameters of a model, and that none is left over."""

import collections
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from moe_jax.errors import UserError
from moe_jax.interop.huggingface.family import Family
from moe_jax.interop.huggingface.files import Stored
from moe_jax.interop.huggingface.table import Tensor
from moe_jax.interop.huggingface.ties import Tables

Shapes = Mapping[str, tuple[int, ...]]


def paths(tree: Any) -> Iterator[str]:
    """Of the leaves of nested dicts, in the order of `jax.tree.leaves`: `stack/stages/0/...`."""
    for path, _ in jax.tree.leaves_with_path(tree):
        yield jax.tree_util.keystr(path, simple=True, separator="/")


def tensors_of_leaves(family: Family, config: Any, shapes: Shapes) -> dict[str, list[Tensor]]:
    """The tensors of each parameter of a model, which together fill it.

    Args:
      family: the model's.
      config: the model's.
      shapes: of its parameters and variables by path.

    Raises:
      UserError: the family has no tensor for a part of a parameter.
    """
    by_leaf = collections.defaultdict(list)
    for tensor in family.tensors(config):
        if tensor.leaf in shapes:
            by_leaf[tensor.leaf].append(tensor)
    for path, shape in shapes.items():
        filled = sum(math.prod(tensor.shape(shape)) for tensor in by_leaf[path])
        if filled != math.prod(shape):
            raise UserError(
                f"parameter {path} has no counterpart in {family.model_type}; change the model or "
                "choose another family."
            )
    return by_leaf


def check_stored(
    family: Family,
    tensors: Mapping[str, Sequence[Tensor]],
    shapes: Shapes,
    stored: Mapping[str, Stored],
    tables: Tables,
    folder: Any,
) -> None:
    """Compares a model's tensors with those of a folder.

    Args:
      family: the model's.
      tensors: of each parameter.
      shapes: of the parameters.
      stored: the folder's.
      tables: the folder's.
      folder: for errors.

    Raises:
      UserError: a tensor is missing, of another shape, or unknown.
    """
    read = set()
    for tensor in (tensor for group in tensors.values() for tensor in group):
        name = tables.sources.get(tensor.name, tensor.name)
        read.add(name)
        if name not in stored:
            raise UserError(
                f"{folder} has no tensor {name}, which a {family.model_type} with its config.json needs; "
                "copy the folder again, or correct config.json."
            )
        wanted = tensor.layout.their_shape(tensor.shape(shapes[tensor.leaf]))
        if stored[name].shape != wanted:
            raise UserError(
                f"tensor {name} of {folder} is {stored[name].shape}, but its config.json makes it "
                f"{wanted}; they do not belong together."
            )
    known = read | tables.known | family.unread(tables.config, stored)
    # What has no entries says nothing: layers of width 0, as transformers has them.
    unknown = [name for name in stored.keys() - known if math.prod(stored[name].shape)]
    if unknown:
        raise UserError(
            f"{folder} has a tensor {min(unknown)}, which a {family.model_type} with its config.json "
            "does not have; such a model is not supported."
        )
