"""Claim 2: what it says of planted effects, and its measurement of a trained run."""

import dataclasses
import pickle

import jax
import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments.claims import balancing
from moe_jax.parallel.mesh import MeshConfig
from moe_jax.reproduction.claim import Profile
from moe_jax.reproduction.results import FinishedRun
from moe_jax.reproduction.verdicts import Verdict, overall
from moe_jax.training.experiment import Evaluation
from moe_jax.training.observation import routing_statistics
from moe_jax.training.run import Run
from moe_jax.training.trained import Trained
from tests.reproduction.synthetic import synthetic_results
from tests.tiny import tiny_config

IMBALANCE = {  # Of the sides, as the papers have it.
    balancing.NO_LOSS: 3.0,
    balancing.LOSS_MILLI: 1.0,
    balancing.LOSS: 0.2,
    balancing.LOSS_TENTH: 0.1,
    balancing.LOSS_ONE: 0.05,
    balancing.SIGMOID_NOTHING: 3.0,
    balancing.SIGMOID_LOSS: 0.7,
    balancing.BIAS_SLOW: 0.4,
    balancing.BIAS: 0.1,
    balancing.BIAS_FAST: 0.2,
}


def planted(effect, profile=Profile.CPU):
    """A side's imbalance is 3.5 + effect * (the papers' - 3.5), and its loss rises with it.

    So 1 plants the papers' signs, -1 the opposite and 0 noise alone.
    """
    rng = np.random.default_rng(0)

    def run(side, seed):
        violation = 3.5 + effect * (IMBALANCE[side.name] - 3.5) + rng.normal() * 0.01
        most = (1 + violation) / 8
        load = [most, *[(1 - most) / 7] * 7]
        layers = side.config(1e-3, seed).model.moe_layers
        records = [
            {"step": step, **{f"router/{layer}/load": load for layer in layers}}
            for step in range(20, 820, 20)
        ]
        balance = {
            "max_violation_global": violation,
            "load_cv": violation / 2,
            "importance_cv": violation / 3,
            "dead_experts": 0.0,
            "dropped": 0.1,
        }
        measured = {"test": {"eval/loss": 2 + 0.1 * violation}, "balance": balance}
        return FinishedRun(seed, 8e-3, records, measured, None, 1.0)

    return synthetic_results(balancing.CLAIM, run, profile)


@pytest.mark.parametrize(("effect", "verdict"), [(1, "reproduced"), (-1, "contradicted")])
def test_a_planted_effect_is_found(effect, verdict):
    found = balancing.findings(planted(effect))
    assert {finding.verdict for finding in found} == {verdict}
    assert overall(found) == verdict


def test_noise_is_no_effect():
    assert overall(balancing.findings(planted(0))) != Verdict.REPRODUCED


def test_runs_that_diverged_count_as_worst():
    results = planted(1)
    results[balancing.NO_LOSS].runs[:] = [
        FinishedRun(seed, 8e-3, [], {}, diverged_at=3, seconds=1.0) for seed in range(3)
    ]
    assert overall(balancing.findings(results)) == Verdict.REPRODUCED
    row = next(r for r in balancing.table(results).rows if r[0] == balancing.NO_LOSS)
    assert row[1] == row[2] == "3 of 3 seeds diverged"


def test_statistics_of_loads():
    loads = np.array([[0.5, 0.5, 0, 0], [0.25, 0.25, 0.25, 0.25]])
    np.testing.assert_allclose(balancing.violation_of_load(loads), [1, 0])
    np.testing.assert_array_equal(balancing.dead_of_load(loads), [2, 0])


def test_the_table_has_no_empty_cell():
    made = balancing.table(planted(1))
    assert {len(row) for row in made.rows} == {len(made.columns)}
    assert all(cell for row in made.rows for cell in row)


def test_the_picture(tmp_path):
    figure = Figure(layout="constrained")
    balancing.draw(planted(1), figure)
    figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 0


def test_over_training_is_the_mean_over_layers():
    records = [
        {"step": step, "router/0/load": [1.0, 0.0], "router/1/load": [0.5, 0.5]} for step in (2, 4)
    ]
    run = FinishedRun(0, 1e-2, records, {}, None, 1.0)
    steps, violations = balancing.over_training(run, [0, 1], balancing.violation_of_load)
    assert steps.tolist() == [2, 4] and violations.tolist() == [0.5, 0.5]


def test_what_is_measured_is_the_load_of_the_test_split(data_dir, tmp_path):
    config = dataclasses.replace(
        tiny_config(data_dir), mesh=MeshConfig(), evaluation=Evaluation(2, 1)
    )
    run = Run.build(config)
    with jax.set_mesh(run.mesh):
        state = run.initial_state()
    trained = Trained(tmp_path, run, 0, state.parameters, state.variables)
    measure = pickle.loads(pickle.dumps(balancing.BALANCE)).measure
    balance = measure(trained)
    block = routing_statistics(trained, trained.open_data(), "test", 1)[1]
    load = np.array(block["load"])
    assert balance["max_violation_global"] == pytest.approx(load.max() / load.mean() - 1)
    assert balance["load_cv"] == pytest.approx(load.std() / load.mean())
    assert balance["dead_experts"] == (load == 0).sum()
    assert 0 <= balance["dropped"] < 1
