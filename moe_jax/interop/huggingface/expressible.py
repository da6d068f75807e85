"""Refuses to write a model as a family that would compute something else with its numbers."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from moe_jax.errors import UserError
from moe_jax.models.abstract_model import AbstractModel
from moe_jax.models.stack import StackConfig

# Fields that change training only, or how and not what a model computes.
_TRAINING = {
    "accept_leak",
    "bias_rate",
    "capacity",
    "dispatch",
    "dropout",
    "dtype",
    "expert_dropout",
    "exploration",
    "exploration_rate",
    "group_rows",
    "group_size",
    "head_bias",
    "init_deviation",
    "init_scale",
    "losses",
    "max_length",
    "order",
    "remat",
    "unroll",
}

# Fields that parameters' names and shapes show, or that nothing reads where those agree.
_SHAPES = {
    "expert_width",
    "experts_by_layer",
    "head_width",
    "kv_heads",
    "mlp_width",
    "moe_at",
    "moe_every",
    "num_experts",
}


def check_expressible(family: str, ours: Any, theirs: Any) -> None:
    """Compares a model's config with that of the model that was written.

    Args:
      family: for the error.
      ours: the model's config.
      theirs: what the written config.json says.

    Raises:
      UserError: they are different models.
    """
    difference = next(_differences(ours, theirs, "model"), None)
    if difference is None and _shapes(ours) != _shapes(theirs):
        difference = "the shapes of its parameters"
    if difference is not None:
        raise UserError(
            f"{family} has no such model: it would lose {difference}; change it or choose another "
            "family."
        )


def _shapes(config: Any) -> dict[Any, Any]:
    abstract_model = AbstractModel.of(config)
    return {"parameters": abstract_model.shapes, "variables": abstract_model.variable_shapes}


def _differences(ours: Any, theirs: Any, path: str) -> Iterator[str]:
    """Yields the fields that differ and are no training's."""
    if type(ours) is not type(theirs):
        yield f"{path}={ours}"
        return
    if not dataclasses.is_dataclass(ours):
        # A float may be written as another that it is computed from.
        close = isinstance(ours, float) and math.isclose(ours, theirs)
        if ours != theirs and not close:
            yield f"{path}={ours}"
        return
    for field in dataclasses.fields(ours):
        # A dense model's experts are not read.
        dense = field.name == "moe" and isinstance(ours, StackConfig) and not ours.sparse
        if field.name not in _TRAINING | _SHAPES and not dense:
            value, other = getattr(ours, field.name), getattr(theirs, field.name)
            yield from _differences(value, other, f"{path}.{field.name}")
