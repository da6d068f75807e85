"""Does a MoE beat its dense twin of equal FLOPs per token? Held-out loss over seeds, with a table.

    python experiments/moe_vs_dense.py --workdir=runs/moe_vs_dense --output=docs/results

Protocol, fixed before the runs: both sides see the same tokens and the same grid of learning rates;
each side takes the rate with the lowest validation loss of seed 0, trains all seeds with it, and is
judged on the test split. The gap counts as resolved above twice its standard error. Finished runs
are not repeated and an interrupted one continues, so the command can be given again at any time.
"""

import dataclasses
import json
import math
import pathlib
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import flags
from tqdm import tqdm

from moe_jax import command_line
from moe_jax.analysis import figures
from moe_jax.analysis.accounting.decoder_lm import dense_twin
from moe_jax.analysis.accounting.families import account
from moe_jax.errors import UserError
from moe_jax.training import experiment, metrics, provenance
from moe_jax.training.experiment import Experiment

LEARNING_RATES = (2e-3, 4e-3, 8e-3)
SEEDS = (0, 1, 2)
SIDES = ("moe", "dense")

_CONFIG = command_line.define_config()
_CONFIG_FILE = "configs/moe_vs_dense.py"
_WORKDIR = flags.DEFINE_string("workdir", "runs/moe_vs_dense", "Folder of the runs.")
_OUTPUT = flags.DEFINE_string("output", "docs/results", "Folder of the table and the picture.")
_EXPERIMENTS = pathlib.Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Trial:
    """One training run: a side, a learning rate and a seed."""

    side: str
    learning_rate: float
    seed: int

    @property
    def workdir(self) -> pathlib.Path:
        """Folder of the run."""
        return pathlib.Path(_WORKDIR.value) / f"{self.side}_lr{self.learning_rate:g}_{self.seed}"

    def command(self) -> list[str]:
        """The command that trains it or continues it."""
        twin = ["--config.model.moe_every=0"] if self.side == "dense" else []
        return [
            sys.executable,
            str(_EXPERIMENTS / "train.py"),
            *_config_arguments(),
            *twin,
            f"--workdir={self.workdir}",
            f"--config.optimizer.learning_rate={self.learning_rate}",
            f"--config.seed={self.seed}",
        ]

    def finished(self, steps: int) -> bool:
        """Whether the run has its last record."""
        records = metrics.read(self.workdir)
        return bool(records) and records[-1]["step"] == steps and self._wall_file.exists()

    @property
    def _wall_file(self) -> pathlib.Path:
        return self.workdir / "wall_seconds.json"

    def train(self, steps: int) -> None:
        """Trains to the end.

        Raises:
          UserError: the run failed; its log is named.
        """
        if self.finished(steps):
            return
        self.workdir.mkdir(parents=True, exist_ok=True)
        log = self.workdir / "log.txt"
        start = time.time()
        before = self.wall_seconds() if self._wall_file.exists() else 0.0
        try:
            with log.open("a") as file:
                status = subprocess.run(self.command(), stdout=file, stderr=file).returncode
        finally:
            self._wall_file.write_text(json.dumps(before + time.time() - start))
        if not self.finished(steps):
            raise UserError(f"run {self.workdir} stopped with status {status}; see {log}.")

    def wall_seconds(self) -> float:
        """Seconds of the training commands, compilation and evaluation included."""
        return json.loads(self._wall_file.read_text())

    def validation_loss(self) -> float:
        """At the last step."""
        return metrics.read(self.workdir)[-1]["eval/loss"]

    def test_losses(self) -> dict[str, float]:
        """By `evaluate.py` on the test split; kept in the run's folder."""
        path = self.workdir / "test.json"
        if not path.exists():
            command = [sys.executable, str(_EXPERIMENTS / "evaluate.py"), "--split=test"]
            command += ["--format=json", f"--workdir={self.workdir}"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise UserError(f"evaluating {self.workdir} failed: {done.stderr[-300:]}")
            path.write_text(done.stdout)
        return json.loads(path.read_text())


def main() -> None:
    """Runs what is missing, then writes the table and the picture."""
    config = command_line.experiment(_CONFIG.value)
    config.validate()
    chosen: dict[str, float] = {}
    total = len(SIDES) * (len(LEARNING_RATES) + len(SEEDS) - 1)
    with tqdm(total=total, unit="run") as bar:
        for side in SIDES:
            grid = [Trial(side, rate, SEEDS[0]) for rate in LEARNING_RATES]
            for trial in grid:
                _train(trial, config.steps, bar)
            chosen[side] = min(grid, key=Trial.validation_loss).learning_rate
        for seed in SEEDS[1:]:
            for side in SIDES:
                _train(Trial(side, chosen[side], seed), config.steps, bar)
    result = _result(config, chosen)
    output = pathlib.Path(_OUTPUT.value)
    output.mkdir(parents=True, exist_ok=True)
    (output / "moe_vs_dense.json").write_text(json.dumps(result, indent=2) + "\n")
    table = _markdown(result)
    (output / "moe_vs_dense.md").write_text(table)
    _draw(result, chosen, output / "moe_vs_dense.png")
    print(table)
    print(f"table, figures and picture are in {output}; runs in {_WORKDIR.value}")


def _config_arguments() -> list[str]:
    """What the user changed in the config, to be passed on to every run."""
    return [argument for argument in sys.argv[1:] if argument.startswith("--config")]


def _train(trial: Trial, steps: int, bar: tqdm) -> None:
    bar.set_description(str(trial.workdir.name))
    trial.train(steps)
    bar.update()


def _result(config: Experiment, chosen: Mapping[str, float]) -> dict[str, Any]:
    """Everything that the table and the picture show."""
    dense = dataclasses.replace(config, model=dense_twin(config.model))
    sides: dict[str, Any] = {}
    for side, its_config in zip(SIDES, (config, dense), strict=True):
        trials = [Trial(side, chosen[side], seed) for seed in SEEDS]
        count = account(its_config.with_group_sizes().model, config.data)
        sides[side] = {
            "learning_rate": chosen[side],
            "validation_loss_by_learning_rate": {
                f"{rate:g}": Trial(side, rate, SEEDS[0]).validation_loss()
                for rate in LEARNING_RATES
            },
            "test": [trial.test_losses() for trial in trials],
            "wall_seconds": [trial.wall_seconds() for trial in trials],
            **dataclasses.asdict(count),
        }
    losses = {side: [t["eval/loss"] for t in sides[side]["test"]] for side in SIDES}
    gap = float(np.mean(losses["dense"]) - np.mean(losses["moe"]))
    error = math.sqrt(sum(np.var(losses[side], ddof=1) / len(SEEDS) for side in SIDES))
    first = experiment.read_record(Trial("moe", chosen["moe"], SEEDS[0]).workdir)
    return {
        "sides": sides,
        "gap": gap,
        "standard_error": error,
        "verdict": _verdict(gap, error),
        "tokens": config.steps * config.data.batch_size * config.data.tokens_per_row,
        "seeds": SEEDS,
        "command": " ".join(["python experiments/moe_vs_dense.py", *_config_arguments()]),
        "commit": first["commit"],
        "dataset": first["dataset"],
        "hardware": provenance.machine(),
    }


def _verdict(gap: float, error: float) -> str:
    if abs(gap) <= 2 * error:
        return "not resolved"
    return "MoE is better" if gap > 0 else "the dense twin is better"


def _markdown(result: Mapping[str, Any]) -> str:
    rows = [
        "| | MoE | dense twin |",
        "|---|---|---|",
    ]
    moe, dense = (result["sides"][side] for side in SIDES)

    def add(label: str, form: Any) -> None:
        rows.append(f"| {label} | {form(moe)} | {form(dense)} |")

    def loss(side: Mapping[str, Any]) -> str:
        values = [t["eval/loss"] for t in side["test"]]
        return f"{np.mean(values):.4f} ± {np.std(values, ddof=1) / math.sqrt(len(values)):.4f}"

    add("test loss (nats/byte), mean ± standard error over seeds", loss)
    add("learning rate chosen on validation", lambda s: f"{s['learning_rate']:g}")
    add("parameters", lambda s: f"{s['parameters'] / 1e6:.2f} M")
    add("algorithmic FLOPs per token, forward", lambda s: f"{s['algorithmic_flops'] / 1e6:.2f} M")
    add(
        "executed FLOPs per token, forward (capacity and router included)",
        lambda s: f"{s['executed_flops'] / 1e6:.2f} M",
    )
    add("wall time per run, median", lambda s: f"{np.median(s['wall_seconds']):.0f} s")
    rows += [
        "",
        f"Gap {result['gap']:.4f} nats/byte, standard error {result['standard_error']:.4f} "
        f"({result['gap'] / result['standard_error']:.1f} of them): **{result['verdict']}**. "
        f"{result['tokens'] / 1e6:.2f} M training bytes of {result['dataset']['name']} "
        f"(sha256 {result['dataset']['sha256'][:12]}), seeds {list(result['seeds'])}, learning "
        f"rates {list(LEARNING_RATES)} tried on both sides, {result['hardware']}, "
        f"commit {str(result['commit'])[:12]}.",
        "",
        f"`{result['command']}`",
        "",
    ]
    return "\n".join(rows)


def _draw(result: Mapping[str, Any], chosen: Mapping[str, float], path: pathlib.Path) -> None:
    curves = {
        side: [metrics.read(Trial(side, chosen[side], seed).workdir) for seed in SEEDS]
        for side in SIDES
    }
    tests = {side: result["sides"][side]["test"] for side in SIDES}
    figures.save_side_by_side(
        curves,
        tests,
        f"MoE and dense twin at equal FLOPs per token: {result['verdict']}, "
        f"gap {result['gap']:.3f} ± {result['standard_error']:.3f} nats/byte",
        path,
    )


if __name__ == "__main__":
    command_line.run(main, _CONFIG_FILE)
