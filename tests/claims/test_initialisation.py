"""Claim 3, initialisation: what it says of planted effects."""

import math

import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments.claims import initialisation
from moe_jax.reproduction.claim import Profile
from moe_jax.reproduction.results import FinishedRun
from moe_jax.reproduction.verdicts import Verdict, overall
from tests.reproduction.synthetic import synthetic_results

DIVERGED = FinishedRun(0, 3e-2, [{"step": 10, "train/loss": 9.0}], {}, diverged_at=11, seconds=1.0)


def run_with(end, steps, seed=0):
    """A run whose losses fall to `end`."""
    records = [
        {"step": step, "train/loss": end + 3 * math.exp(-4 * step / steps)}
        for step in range(10, steps + 1, 10)
    ]
    records[len(records) // 2 - 1]["eval/loss"] = end + 0.3
    records[-1]["eval/loss"] = end
    return FinishedRun(seed, 3e-2, records, {"test": {"eval/loss": end}}, None, 1.0)


def planted(mean, spread):
    """Losses of 2 + mean(s) + spread(s) * noise at the end."""

    def run(side, seed):
        scale = float(side.name.removeprefix("s = "))
        noise = (1.1, -0.9, 0.05, 1.3, -1.4)[seed]
        return run_with(2 + mean(scale) + spread(scale) * noise, side.changes["steps"], seed)

    return synthetic_results(initialisation.CLAIM, run)


LIKE_THE_PAPER = {
    "mean": lambda s: 0.9 if s == 1 else 0.0,
    "spread": lambda s: 0.2 if s == 1 else 0.01,
}
REVERSED = {
    "mean": lambda s: 0.0 if s == 1 else 0.9,
    "spread": lambda s: 0.01 if s == 1 else 0.2,
}
NULL = {"mean": lambda s: 0.0, "spread": lambda s: 0.05 * (1 + s / 10)}


@pytest.mark.parametrize(
    ("effect", "verdict"),
    [(LIKE_THE_PAPER, Verdict.REPRODUCED), (REVERSED, Verdict.CONTRADICTED)],
)
def test_a_planted_effect_is_found(effect, verdict):
    found = initialisation.findings(planted(**effect))
    assert {finding.verdict for finding in found} == {verdict}


def test_noise_is_no_effect():
    assert overall(initialisation.findings(planted(**NULL))) == Verdict.NOT_RESOLVED


def test_a_run_that_diverged_is_the_worst_and_the_farthest_off():
    results = planted(**LIKE_THE_PAPER)
    runs = results["s = 1"].runs
    runs[0] = DIVERGED
    losses = initialisation.losses_at_end(results["s = 1"])
    assert losses[0] == math.inf
    assert np.isfinite(losses[1:]).all()
    deviations = initialisation.deviations(losses)
    assert deviations[0] == math.inf
    assert np.isfinite(deviations[1:]).all()
    runs[:] = [DIVERGED] * 5
    assert (
        initialisation.deviations(initialisation.losses_at_end(results["s = 1"])) == [math.inf] * 5
    )
    assert overall(initialisation.findings(results)) == Verdict.REPRODUCED
    initialisation.draw(results, Figure(layout="constrained"))


def test_deviations_are_from_the_median():
    assert initialisation.deviations([1.0, 5.0, 2.0]) == [1.0, 3.0, 0.0]


def test_the_table_has_no_empty_cell():
    made = initialisation.table(planted(**LIKE_THE_PAPER))
    assert {len(row) for row in made.rows} == {len(made.columns)}
    assert all(cell for row in made.rows for cell in row)


def test_the_picture(tmp_path):
    figure = Figure(layout="constrained")
    initialisation.draw(planted(**LIKE_THE_PAPER), figure)
    figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 0


@pytest.mark.parametrize("profile", Profile)
def test_configs_are_valid(profile):
    for side in initialisation.sides(profile):
        config = side.config(side.learning_rates[0], 0)
        config.validate()
        assert config.optimizer.learning_rate == initialisation.LEARNING_RATE
        assert config.steps % 2 == 0
        assert config.steps // 2 == config.evaluation.every, "the loss is read at both steps"
