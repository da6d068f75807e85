"""Claim 1: what it says of planted effects, and how it counts steps."""

import math

import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments.claims import more_experts
from moe_jax.reproduction.claim import Profile
from moe_jax.reproduction.results import FinishedRun
from moe_jax.reproduction.verdicts import Verdict, overall
from tests.reproduction.synthetic import synthetic_results

STEPS = (200, 400, 600, 800)


def run_with(losses, test_loss, seed=0):
    """A run whose validation losses are given."""
    records = [{"step": step, "eval/loss": loss} for step, loss in zip(STEPS, losses, strict=True)]
    return FinishedRun(seed, 8e-3, records, {"test": {"eval/loss": test_loss}}, None, 1.0)


def planted(slope, noise=0.003, profile=Profile.CPU):
    """Losses of 2 + slope * log2 E at the end, for every seed with noise of its own."""
    rng = np.random.default_rng(0)

    def run(side, seed):
        E = 1 if side.name == "dense" else int(side.name.split()[0])
        end = 2 + slope * math.log2(E) + rng.normal() * noise
        return run_with([end + 0.5, end + 0.25, end + 0.1, end], end, seed)

    return synthetic_results(more_experts.CLAIM, run, profile)


@pytest.mark.parametrize(
    ("slope", "verdict"), [(-0.05, Verdict.REPRODUCED), (0.05, Verdict.CONTRADICTED)]
)
def test_a_planted_effect_is_found(slope, verdict):
    found = more_experts.findings(planted(slope))
    assert {finding.verdict for finding in found} == {verdict}
    assert overall(found) == verdict


def test_noise_is_no_effect():
    assert overall(more_experts.findings(planted(0.0))) != Verdict.REPRODUCED


def test_the_slope_is_that_of_the_losses():
    assert more_experts.slopes(planted(-0.05, noise=0.0)) == pytest.approx([-0.05] * 3)


def test_steps_are_interpolated_in_their_logarithm():
    run = run_with([3.0, 2.0, 1.5, 1.0], 1.0)
    assert more_experts.steps_to(2.5, run) == pytest.approx(math.sqrt(200 * 400))
    assert more_experts.steps_to(2.0, run) == pytest.approx(400)
    assert more_experts.steps_to(4.0, run) == 200
    assert more_experts.steps_to(0.5, run) == math.inf


def test_a_diverged_run_is_no_success():
    results = planted(-0.05)
    results["32 experts"].runs[:] = [
        FinishedRun(seed, 8e-3, [], {}, diverged_at=3, seconds=1.0) for seed in range(3)
    ]
    assert more_experts.speed_ups(results, 32) == [0, 0, 0]
    assert more_experts.slopes(results) == [math.inf] * 3
    assert overall(more_experts.findings(results)) == Verdict.CONTRADICTED


def test_the_table_has_no_empty_cell():
    made = more_experts.table(planted(-0.05))
    assert {len(row) for row in made.rows} == {len(made.columns)}
    assert all(cell for row in made.rows for cell in row)


def test_the_picture(tmp_path):
    figure = Figure(layout="constrained")
    more_experts.draw(planted(-0.05), figure)
    figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 0


@pytest.mark.parametrize("profile", Profile)
def test_configs_are_valid(profile):
    sides = more_experts.sides(profile)
    assert [side.name for side in sides][:2] == ["dense", "2 experts"]
    for side in sides:
        config = side.config(1e-3, 0)
        config.validate()
        if side.name != "dense":
            assert config.model.moe.router.gate_scale == pytest.approx(
                (2 * config.model.num_experts) ** 0.5
            )
