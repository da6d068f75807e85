"""What claims measure of finished runs."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from moe_jax.configuration import changed
from moe_jax.training.evaluator import Evaluator
from moe_jax.training.run import Run
from moe_jax.training.trained import Trained


def evaluated(trained: Trained, split: str) -> dict[str, float]:
    """`eval/<metric>` and `eval/<metric>/<domain>` on as many batches as the config evaluates on."""
    config = trained.run.config
    evaluate = Evaluator(trained.run, trained.open_data(), split, config.evaluation.batches)
    with jax.set_mesh(trained.run.mesh):
        return evaluate(trained.parameters, trained.variables)


def test_split(trained: Trained) -> dict[str, float]:
    """`evaluated` on the test split."""
    return evaluated(trained, "test")


def test_split_with(trained: Trained, changes: Mapping[str, Any]) -> dict[str, float]:
    """The same parameters on the test split in a model whose config is another.

    Args:
      trained: the run.
      changes: path of a config field -> its value, such as
        {"model.moe.capacity.evaluation_factor": 0.5}.
    """
    return test_split(with_changes(trained, changes))


def with_changes(trained: Trained, changes: Mapping[str, Any]) -> Trained:
    """The run with the same parameters and another config."""
    run = Run.build(changed(trained.run.config, changes))
    return dataclasses.replace(trained, run=run)
