"""Claim 4, priority orders: what it says of planted effects."""

import dataclasses

import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments.claims import priority
from moe_jax.reproduction.claim import Profile
from moe_jax.reproduction.results import FinishedRun
from moe_jax.reproduction.verdicts import Verdict, overall
from moe_jax.routing.priority import Priority
from tests.reproduction.synthetic import synthetic_results


def planted(effect, profile=Profile.CPU):
    """Left to right costs `effect` nats at the small factor, and nothing at the large one."""
    rng = np.random.default_rng(0)

    def run(side, seed):
        moe = side.config(1e-3, seed).model.moe
        costs = moe.router.order == Priority.TOKEN and moe.capacity.train_factor < 1
        loss = 2.4 + effect * costs + rng.normal() * 0.003
        records = [{"step": 20, "train/loss": 2.5, "router/0/dropped": 0.5}]
        at_two = {"eval/loss": loss - 0.1, "dropped": 0.0}
        measured = {"test": {"eval/loss": loss}, "test at evaluation factor 2": at_two}
        return FinishedRun(seed, 8e-3, records, measured, None, 1.0)

    return synthetic_results(priority.CLAIM, run, profile)


@pytest.mark.parametrize(
    ("effect", "verdict"), [(0.05, Verdict.REPRODUCED), (-0.05, Verdict.CONTRADICTED)]
)
def test_a_planted_effect_is_found(effect, verdict):
    found = priority.findings(planted(effect))
    assert {finding.verdict for finding in found} == {verdict}
    assert overall(found) == verdict


def test_noise_is_no_effect():
    assert overall(priority.findings(planted(0.0))) != Verdict.REPRODUCED


def test_pairs_with_a_diverged_run_are_left_out():
    results = planted(0.05)
    name = priority.side_name(Priority.TOKEN, priority.SMALL)
    runs = results[name].runs
    runs[0] = dataclasses.replace(runs[0], diverged_at=3, measured={})
    assert len(priority.gains(results, priority.SMALL)) == 2
    runs[1:] = [runs[0]] * 2
    assert priority.gains(results, priority.SMALL) == [0.0]
    assert all(cell for row in priority.table(results).rows for cell in row)


def test_the_table_has_no_empty_cell():
    made = priority.table(planted(0.05))
    assert {len(row) for row in made.rows} == {len(made.columns)}
    assert all(cell for row in made.rows for cell in row)
    with_priority = {row[0]: row[-1] for row in made.rows}
    assert with_priority["top-1 at 0.5, batch priority"] == "1.433"


def test_the_picture(tmp_path):
    figure = Figure(layout="constrained")
    priority.draw(planted(0.05), figure)
    figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 0
