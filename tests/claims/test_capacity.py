"""Claim 4: what it says of planted effects, and its measurement of a trained run."""

import pickle

import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments.claims import capacity
from moe_jax.parallel.mesh import MeshConfig
from moe_jax.reproduction.claim import Profile
from moe_jax.reproduction.results import FinishedRun
from moe_jax.reproduction.verdicts import Verdict, overall
from moe_jax.training import loop
from moe_jax.training.trained import Trained
from tests.reproduction.synthetic import synthetic_results
from tests.tiny import tiny_config


def planted(effect, noise=0.001, profile=Profile.CPU):
    """A token that is dropped costs `effect` nats, in training and in evaluation."""
    rng = np.random.default_rng(0)

    def dropped_at(factor):
        return 0.6 * np.exp(-3 * (factor - 0.5))

    def run(side, seed):
        dropless = side.name == "dropless"
        dropped = 0.0 if dropless else dropped_at(float(side.name.split()[1]))
        records = [
            {"step": step, "train/loss": 2.0, "router/0/dropped": dropped}
            for step in range(20, 820, 20)
        ]
        own = 2 + effect * dropped + rng.normal() * noise
        measured = {"test": {"eval/loss": own + effect * dropped_at(2.0)}}
        for factor in () if dropless else capacity.FACTORS:
            measured[capacity.at_evaluation_factor(factor).name] = {
                "eval/loss": own + effect * dropped_at(factor) + rng.normal() * noise,
                "dropped": dropped_at(factor),
            }
        return FinishedRun(seed, 8e-3, records, measured, None, 1.0)

    return synthetic_results(capacity.CLAIM, run, profile)


@pytest.mark.parametrize(
    ("effect", "verdict"), [(0.3, Verdict.REPRODUCED), (-0.3, Verdict.CONTRADICTED)]
)
def test_a_planted_effect_is_found(effect, verdict):
    found = capacity.findings(planted(effect))
    assert {finding.verdict for finding in found} == {verdict}
    assert overall(found) == verdict


def test_noise_is_no_effect():
    assert overall(capacity.findings(planted(0.0))) != Verdict.REPRODUCED


def test_runs_that_diverged_count_as_worst():
    results = planted(0.3)
    for side in (0.5, 0.75):
        results[capacity.side_name(side)].runs[:] = [
            FinishedRun(seed, 8e-3, [], {}, diverged_at=3, seconds=1.0) for seed in range(3)
        ]
    half, three_quarters, *_ = capacity.findings(results)
    assert half.verdict == three_quarters.verdict == Verdict.REPRODUCED
    assert all(cell for row in capacity.table(results).rows for cell in row)


def test_drop_rates_are_of_the_second_half():
    records = [
        {"step": i, "train/loss": 1.0, "router/0/dropped": d, "router/1/dropped": 0.0}
        for i, d in enumerate([1.0, 1.0, 0.2, 0.4])
    ]
    run = FinishedRun(0, 1e-3, [*records, {"step": 4, "eval/loss": 1.0}], {}, None, 1.0)
    assert capacity.training_drop_rate(run) == pytest.approx(15)


@pytest.mark.parametrize("profile", Profile)
def test_only_the_dropless_side_has_no_limit(profile):
    dropless = {
        side.name: side.config(1e-3, 0).model.moe.dispatch.dropless
        for side in capacity.sides(profile)
    }
    assert [name for name, without in dropless.items() if without] == ["dropless"]


def test_the_table_has_no_empty_cell():
    made = capacity.table(planted(0.3))
    assert {len(row) for row in made.rows} == {len(made.columns)}
    assert all(cell for row in made.rows for cell in row)


def test_the_picture(tmp_path):
    figure = Figure(layout="constrained")
    capacity.draw(planted(0.3), figure)
    figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 0


def test_smaller_buffers_drop_more(data_dir, tmp_path):
    config = tiny_config(data_dir)
    config.steps, config.mesh = 4, MeshConfig()
    loop.train(config, tmp_path)
    trained = Trained.load(tmp_path)
    few, all_served = (
        pickle.loads(pickle.dumps(capacity.at_evaluation_factor(factor))).measure(trained)
        for factor in (0.5, 4.0)
    )
    # At least half find no slot; with as many slots as tokens nothing is dropped.
    assert 0.5 <= few["dropped"] < 1
    assert all_served["dropped"] == 0
    assert few["eval/loss"] != all_served["eval/loss"]
