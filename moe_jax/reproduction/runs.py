"""The folder of one run: training with a config, what was measured of it, how it ended."""

import dataclasses
import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from moe_jax import component, configuration
from moe_jax.reproduction.claim import Measurement
from moe_jax.reproduction.results import FinishedRun
from moe_jax.training import experiment, metrics
from moe_jax.training.experiment import Experiment

_DIVERGED, _SECONDS, _LOG = "diverged.json", "seconds.json", "log.txt"


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """A run, finished or not; claims whose configs are equal share it.

    Attributes:
      config: of the run.
      path: WORKDIR/runs/<hash of the config>: what `moe_jax.training.loop.train` writes, `log.txt`,
        and a file for each measurement in `measured/`.
    """

    config: Experiment
    path: pathlib.Path

    @classmethod
    def of(cls, config: Experiment, workdir: pathlib.Path) -> "RunFolder":
        """The folder of a config in a suite's workdir."""
        text = json.dumps(configuration.encode(config), sort_keys=True)
        return cls(config, workdir / "runs" / hashlib.sha256(text.encode()).hexdigest()[:16])

    def __reduce__(self) -> tuple[Any, ...]:
        # To another process as its config.json, because classes of a config file cannot be pickled.
        origins = component.origins(configuration.classes(self.config))
        return _opened, (configuration.encode(self.config), origins, self.path)

    @property
    def log(self) -> pathlib.Path:
        """What the run's processes printed."""
        return self.path / _LOG

    @functools.cached_property
    def records(self) -> list[metrics.Record]:
        """Of metrics.jsonl, as of the first call."""
        return metrics.read(self.path)

    @property
    def diverged_at(self) -> int | None:
        """Step at which loss or gradients were not finite; None if they always were."""
        path = self.path / _DIVERGED
        return json.loads(path.read_text())["step"] if path.exists() else None

    def diverged(self, step: int) -> None:
        """Notes that the run ended at a step because its loss or gradients were not finite."""
        write_json(self.path / _DIVERGED, {"step": step})

    @property
    def trained(self) -> bool:
        """Whether training came to an end, a divergence included."""
        if self.diverged_at is not None:
            return True
        last = metrics.read(self.path)[-1:]
        return bool(last) and last[0]["step"] == self.config.steps and "eval/loss" in last[0]

    @property
    def validation_loss(self) -> float:
        """At the last step; infinite if the run diverged."""
        return float("inf") if self.diverged_at is not None else self.records[-1]["eval/loss"]

    def missing(self, measurements: Sequence[Measurement]) -> list[Measurement]:
        """Those that were not made yet; none of a run that diverged."""
        if self.diverged_at is not None:
            return []
        return [m for m in measurements if not self._measured(m).exists()]

    def measured(self, measurement: Measurement, value: Any) -> None:
        """Keeps a measured value."""
        self._measured(measurement).parent.mkdir(exist_ok=True)
        write_json(self._measured(measurement), value)

    def _measured(self, measurement: Measurement) -> pathlib.Path:
        return self.path / "measured" / f"{re.sub(r'[^a-zA-Z0-9.]+', '_', measurement.name)}.json"

    @property
    def seconds(self) -> float:
        """Of all processes that worked on the run."""
        path = self.path / _SECONDS
        return json.loads(path.read_text()) if path.exists() else 0.0

    def worked(self, seconds: float) -> None:
        """Adds the time of one process."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / _SECONDS, self.seconds + seconds)

    def finished(self, measurements: Sequence[Measurement]) -> FinishedRun:
        """What came of it, with these measurements."""
        diverged_at = self.diverged_at
        measured = {} if diverged_at is not None else {
            m.name: json.loads(self._measured(m).read_text()) for m in measurements
        }  # fmt: skip
        return FinishedRun(
            self.config.seed,
            self.config.optimizer.learning_rate,
            self.records,
            measured,
            diverged_at,
            self.seconds,
        )

    def provenance(self) -> dict[str, Any]:
        """Commit, versions, devices and dataset, as config.json says."""
        record = experiment.read_record(self.path)
        return {name: value for name, value in record.items() if name != "config"}


def _opened(config: Any, origins: dict[str, Any], path: pathlib.Path) -> RunFolder:
    component.import_again(origins)
    return RunFolder(configuration.decode(config, origins), path)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a file that is whole or not there, whenever the process is killed."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.replace(path)
