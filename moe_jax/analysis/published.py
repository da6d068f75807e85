"""What a paper prints of a model, beside what our config of it has.

A row of a config file has a tuple of `Published`; `compare` counts the model and checks each. Nothing
is allocated: models are built abstractly, from the modules that train.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from moe_jax.analysis.accounting.costs import Accounting, count
from moe_jax.analysis.accounting.families import account, operations_per_timestep
from moe_jax.data.interface import DataConfig
from moe_jax.models.abstract_model import AbstractModel
from moe_jax.models.interface import ModelConfig
from moe_jax.published import Published, Quantity


@dataclasses.dataclass(frozen=True)
class CheckedNumber:
    """One published number and ours.

    Attributes:
      paper, model: file and row of the config.
      quantity: see `Quantity`.
      published, computed: the numbers.
      printed, computed_as_printed: the same as text, with the digits of the paper.
      relative_error: (computed - published) / published.
      tolerance: largest absolute difference that printing explains.
      ok: whether it is within.
      note: source and remarks.
    """

    paper: str
    model: str
    quantity: str
    published: float
    computed: float
    printed: str
    computed_as_printed: str
    relative_error: float
    tolerance: float
    ok: bool
    note: str


def compare(
    paper: str,
    name: str,
    model: ModelConfig,
    data: DataConfig,
    published: Sequence[Published],
) -> list[CheckedNumber]:
    """Counts a model once, on rows of the data, and checks each published number."""
    counted = account(model, data)
    rows = []
    for number in published:
        computed = _compute(number.quantity, model, data, counted)
        difference = computed - number.value
        note = f"{number.source}; {number.note}" if number.note else number.source
        rows.append(
            CheckedNumber(
                paper,
                name,
                number.quantity.value,
                number.value,
                computed,
                number.printed,
                number.as_printed(computed),
                difference / number.value,
                number.tolerance,
                number.met_by(computed),
                note,
            )
        )
    return rows


def _compute(quantity: Quantity, model: Any, data: DataConfig, counted: Accounting) -> float:
    match quantity:
        case Quantity.PARAMETERS:
            return counted.parameters
        case Quantity.PARAMETERS_WITHOUT_EMBEDDINGS:
            return counted.parameters - _embeddings(model)
        case Quantity.PARAMETERS_OF_BLOCKS:
            return count(AbstractModel.of(model).shapes["stack"])
        case Quantity.ACTIVATED:
            return counted.activated_parameters
        case Quantity.ACTIVATED_WITHOUT_INPUT:
            return _activated_without_input(model, counted)
        case Quantity.TRAINING_FLOPS_PER_SEQUENCE:
            length = data.tokens_per_row
            activated = _activated_without_input(model, counted)
            return (6 * activated + 12 * model.num_layers * model.width * length) * length
        case Quantity.OPS_PER_TIMESTEP:
            return operations_per_timestep(model)
        case _:
            if quantity != f"FLOPs per {counted.unit}":
                raise ValueError(f"{quantity} of a model whose FLOPs are of a {counted.unit}")
            return counted.algorithmic_flops


def _tokens(model: Any) -> Any:
    return AbstractModel.of(model).shapes["tokens"]


def _embeddings(model: Any) -> int:
    shapes = AbstractModel.of(model).shapes
    return count({name: shapes[name] for name in ("tokens", "positions") if name in shapes})


def _activated_without_input(model: Any, counted: Accounting) -> int:
    tokens = _tokens(model)
    # A tied table is the output layer, too.
    return counted.activated_parameters - (count(tokens["table"]) if "output" in tokens else 0)
