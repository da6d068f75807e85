"""Claim 3, precision of the router: what it says of planted effects."""

import math

import pytest
from matplotlib.figure import Figure

from experiments.claims import router_precision
from moe_jax.reproduction.claim import Profile
from moe_jax.reproduction.results import FinishedRun
from moe_jax.reproduction.verdicts import Verdict, overall
from tests.reproduction.synthetic import synthetic_results

NOISE = (0.011, -0.009, 0.002, 0.006, -0.012)


def run_with(end, lowest=None, seed=0, diverged_at=None):
    """A run whose training loss falls to `lowest`, by default the end, and then goes to `end`."""
    lowest = end if lowest is None else lowest
    losses = [5.5, (5.5 + lowest) / 2, lowest, (lowest + end) / 2, end]
    records = [{"step": 80 * (i + 1), "train/loss": loss} for i, loss in enumerate(losses)]
    measured = {} if diverged_at else {"test": {"eval/loss": end}}
    return FinishedRun(seed, 4e-2, records, measured, diverged_at, 1.0)


def planted(ends, lowest=2.0):
    """Runs that end at a loss for each side."""

    def run(side, seed):
        noise = NOISE[(seed + len(side.name)) % 5]
        return run_with(ends[side.name] + noise, lowest + noise, seed)

    return synthetic_results(router_precision.CLAIM, run)


LIKE_THE_PAPER = {"float32": 2.0, "selective": 2.0, "bfloat16": 4.0}
REVERSED = {"float32": 2.0, "selective": 4.0, "bfloat16": 2.0}
NULL = {"float32": 2.0, "selective": 2.0, "bfloat16": 2.0}


@pytest.mark.parametrize(
    ("ends", "verdict"),
    [(LIKE_THE_PAPER, Verdict.REPRODUCED), (REVERSED, Verdict.CONTRADICTED)],
)
def test_a_planted_effect_is_found(ends, verdict):
    found = router_precision.findings(planted(ends))
    assert {finding.verdict for finding in found} == {verdict}


def test_noise_is_no_effect():
    assert overall(router_precision.findings(planted(NULL))) == Verdict.NOT_RESOLVED


def test_a_run_has_diverged_if_its_loss_rose_or_was_not_finite():
    assert router_precision.diverged(run_with(2.0)) == 0
    assert router_precision.diverged(run_with(2.9, lowest=2.0)) == 0
    assert router_precision.diverged(run_with(3.1, lowest=2.0)) == 1
    assert router_precision.diverged(run_with(2.0, diverged_at=400)) == 1


def test_runs_that_are_not_finite_are_the_worst():
    results = planted(NULL)
    results["bfloat16"].runs[:] = [run_with(9.0, 2.0, seed, 400) for seed in range(5)]
    assert results["bfloat16"].test_losses == [math.inf] * 5
    assert overall(router_precision.findings(results)) == Verdict.REPRODUCED
    router_precision.draw(results, Figure(layout="constrained"))


def test_the_table_has_no_empty_cell():
    made = router_precision.table(planted(LIKE_THE_PAPER))
    assert {len(row) for row in made.rows} == {len(made.columns)}
    assert all(cell for row in made.rows for cell in row)


def test_the_picture(tmp_path):
    figure = Figure(layout="constrained")
    router_precision.draw(planted(LIKE_THE_PAPER), figure)
    figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 0


@pytest.mark.parametrize("profile", Profile)
def test_configs_are_valid(profile):
    for side in router_precision.sides(profile):
        config = side.config(side.learning_rates[0], 0)
        config.validate()
        precision = (config.model.dtype, config.model.moe.router.dtype)
        assert precision == router_precision.PRECISIONS[side.name]
