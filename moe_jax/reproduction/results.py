"""Finished runs of a claim, as its findings, table and picture read them."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from moe_jax.reproduction.claim import Profile, Side
from moe_jax.training.experiment import Experiment
from moe_jax.training.metrics import Record


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """One run of a side.

    Attributes:
      seed, learning_rate: of the run.
      records: of metrics.jsonl: `train/...`, `router/<block>/...`, `eval/...`.
      measured: name of a measurement -> its value; empty for a run that diverged.
      diverged_at: the step at which loss or gradients were not finite; None for a run that ended.
      seconds: of training and measuring, compilation included.
    """

    seed: int
    learning_rate: float
    records: Sequence[Record]
    measured: Mapping[str, Any]
    diverged_at: int | None
    seconds: float

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values [n] float64 of one metric, where it was recorded and finite."""
        found = [(r["step"], r[name]) for r in self.records if r.get(name) is not None]
        steps = np.array([step for step, _ in found], np.int64)
        return steps, np.array([value for _, value in found], np.float64)

    @property
    def test_loss(self) -> float:
        """On the test split; infinite if the run diverged."""
        return np.inf if self.diverged_at is not None else self.measured["test"]["eval/loss"]


@dataclasses.dataclass(frozen=True)
class SideResult:
    """What came of a side.

    Attributes:
      side: see `Side`.
      config: of its first run.
      learning_rate: the chosen one.
      validation: learning rate -> validation loss of the first seed; infinite if it diverged.
      runs: at the chosen rate, in the order of the seeds.
      seconds: of these runs and of those at the rates that were not chosen, compilation and
        measurements included.
      parameters: count.
      algorithmic_flops, executed_flops: of training one run.
    """

    side: Side
    config: Experiment
    learning_rate: float
    validation: Mapping[float, float]
    runs: Sequence[FinishedRun]
    seconds: float
    parameters: int
    algorithmic_flops: float
    executed_flops: float

    def sample(self, value: Callable[[FinishedRun], float]) -> list[float]:
        """The value of each seed's run."""
        return [value(run) for run in self.runs]

    @property
    def test_losses(self) -> list[float]:
        """Of each seed."""
        return self.sample(lambda run: run.test_loss)


@dataclasses.dataclass(frozen=True)
class Results:
    """All sides of a claim, by name.

    Attributes:
      profile: what the runs are sized for.
      sides: in the order of the claim.
    """

    profile: Profile
    sides: Mapping[str, SideResult]

    def __getitem__(self, name: str) -> SideResult:
        return self.sides[name]
