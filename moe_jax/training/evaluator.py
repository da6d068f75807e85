"""Metrics of a run's task on held-out data."""

import logging
from typing import Any

import jax
import numpy as np

from moe_jax.data.interface import Pipeline
from moe_jax.models.abstract_model import Tree
from moe_jax.tasks.task import Batch, Sums
from moe_jax.training import metrics
from moe_jax.training.hyperparameters import Hyperparameters
from moe_jax.training.run import Run
from moe_jax.training.step import evaluation_step

_LOG = logging.getLogger(__name__)


class Evaluator:
    """What a run's task measures on held-out data, in total and per domain.

    Attributes:
      num_batches: as many as there are, at most what was asked for.
    """

    def __init__(self, run: Run, data: Pipeline, split: str, batches: int) -> None:
        """Reads the batches.

        Raises:
          UserError: the split does not exist, or has nothing to measure.
        """
        self._run, self._domains = run, data.domains
        self._batches = data.held_out_batches(split, batches)
        self.num_batches = len(self._batches)

        def step(parameters: Tree, variables: Tree, batch: Batch, given: Hyperparameters) -> Sums:
            abstract_model = run.abstract_model.with_factors(given.routers)
            one_step = evaluation_step(abstract_model, run.config.task, len(data.domains))
            return one_step(parameters, variables, batch)

        self._step = jax.jit(step, out_shardings=run.replicated)

    def __call__(self, parameters: Any, variables: Any) -> metrics.Record:
        """`eval/<metric>`, the mean over all that is held out, and `eval/<metric>/<domain>`.

        A metric of which nothing was counted, as of masked tokens where no batch has any, is left out.
        """
        totals: dict[str, np.ndarray] = {}
        for batch in self._batches:
            placed, given = self._run.put_batch(batch), self._run.hyperparameters
            found = jax.device_get(self._step(parameters, variables, placed, given))
            for name, sums in found.items():
                totals[name] = totals.get(name, 0) + np.asarray(sums, np.float64)
        record = {}
        for name, (sums, counts) in totals.items():
            if not counts.sum():
                _LOG.warning(
                    "eval/%s is left out: in the held-out batches nothing is counted.", name
                )
                continue
            record[f"eval/{name}"] = float(sums.sum() / counts.sum())
            for domain, total, count in zip(self._domains, sums, counts, strict=True):
                if count:
                    record[f"eval/{name}/{domain}"] = float(total / count)
        return record
