"""Claim 6: what it says of planted effects, its totals, and its measurements of a trained run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments.claims import fine_grained
from moe_jax.analysis.accounting import families
from moe_jax.parallel.mesh import MeshConfig
from moe_jax.reproduction import measurements
from moe_jax.reproduction.claim import TEST, Profile
from moe_jax.reproduction.results import FinishedRun
from moe_jax.reproduction.verdicts import Verdict, overall
from moe_jax.routing.token_choice import TopK
from moe_jax.training import loop
from moe_jax.training.trained import Trained
from tests.reproduction.synthetic import synthetic_results
from tests.tiny import tiny_config

QUALITY = {  # 0 for GShard, 1 for DeepSeekMoE; OLMoE's sides as OLMoE has them.
    fine_grained.GSHARD: 0.0,
    fine_grained.COARSE_SHARED: 0.3,
    fine_grained.HALVES: 0.8,
    fine_grained.HALVES_SHARED: 0.6,
    fine_grained.HALVES_TWO_SHARED: 0.6,
    fine_grained.QUARTERS: 0.9,
    fine_grained.DEEPSEEK: 1.0,
    fine_grained.TWO_SHARED: 1.0,
    fine_grained.WIDER_GSHARD: 1.0,
}


def planted(effect, profile=Profile.CPU):
    """The loss falls by `effect` times the side's quality; disabling costs DeepSeekMoE the more."""
    rng = np.random.default_rng(0)

    def run(side, seed):
        loss = 2 - effect * QUALITY[side.name] + rng.normal() * 0.003
        damage = effect * (4 if side.name == fine_grained.DEEPSEEK else 1)
        measured = {
            measurement.name: {"eval/loss": loss + damage * i + rng.normal() * 0.003}
            for i, measurement in enumerate(side.measurements)
        }
        measured[TEST.name] = {"eval/loss": loss}
        return FinishedRun(seed, 8e-3, [], measured, None, 1.0)

    return synthetic_results(fine_grained.CLAIM, run, profile)


@pytest.mark.parametrize(
    ("effect", "verdict"), [(0.1, Verdict.REPRODUCED), (-0.1, Verdict.CONTRADICTED)]
)
def test_a_planted_effect_is_found(effect, verdict):
    found = fine_grained.findings(planted(effect))
    assert {finding.verdict for finding in found} == {verdict}
    assert overall(found) == verdict


def test_noise_is_no_effect():
    assert overall(fine_grained.findings(planted(0.0))) != Verdict.REPRODUCED


def test_runs_that_diverged_count_as_worst():
    results = planted(0.1)
    results[fine_grained.GSHARD].runs[:] = [
        FinishedRun(seed, 8e-3, [], {}, diverged_at=3, seconds=1.0) for seed in range(3)
    ]
    assert fine_grained.findings(results)[0].verdict == Verdict.REPRODUCED
    diverged = results[fine_grained.GSHARD].runs[0]
    assert fine_grained.increase_without_best(diverged) == np.inf


@pytest.mark.parametrize("profile", Profile)
def test_sides_have_the_experts_that_their_names_count(profile):
    """Split, 16 experts of which a token visits 2 stay as wide and as many to a token."""
    for side in fine_grained.sides(profile):
        model = side.config(1e-3, 0).model
        routed, *shared = map(int, side.name.rpartition(":")[-1].split("+"))
        assert (model.num_experts, model.moe.shared_experts) == (routed, sum(shared)), side.name
        segments = (routed + sum(shared)) // 16
        assert model.moe.router.choices + sum(shared) == 2 * segments, side.name
        widening = 1.5 if side.name == fine_grained.WIDER_GSHARD else 1
        assert model.expert_width * segments == model.mlp_width * widening, side.name


@pytest.mark.parametrize("profile", Profile)
def test_totals_are_fixed(profile):
    """But for the router, which has a column for each routed expert."""
    totals = set()
    for side in fine_grained.sides(profile):
        config = side.config(1e-3, 0)
        model, accounting = config.model, families.account(config.model, config.data)
        router = model.width * model.num_experts * (model.num_layers // model.moe_every)
        if side.name != fine_grained.WIDER_GSHARD:
            totals.add((accounting.parameters - router, accounting.activated_parameters - router))
    assert len(totals) == 1


@pytest.mark.parametrize("experts", fine_grained.SIDES.values(), ids=fine_grained.SIDES)
def test_the_routed_sum_begins_equally_large(experts):
    """The mean norm of the gates, of logits that are drawn."""
    logits = np.random.default_rng(0).normal(size=(2000, experts.routed))
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    best = np.sort(probabilities, axis=1)[:, -experts.choices :]
    norm = experts.gate_scale * np.linalg.norm(best, axis=1).mean()
    assert norm == pytest.approx(np.sqrt(experts.choices / experts.segments), rel=0.1)


def test_the_table_has_no_empty_cell():
    made = fine_grained.table(planted(0.1))
    assert {len(row) for row in made.rows} == {len(made.columns)}
    assert all(cell for row in made.rows for cell in row)


def test_the_picture(tmp_path):
    figure = Figure(layout="constrained")
    fine_grained.draw(planted(0.1), figure)
    figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 0


def test_the_best_experts_are_out_of_reach():
    """The choice goes on with the next two, at gates that stay as they were."""
    x = jnp.array([[4.0, 3.0, 2.0, 1.0]])
    inputs = dataclasses.make_dataclass("Inputs", ["x", "train"])(x, False)
    parameters = {"weights": jnp.eye(4)}
    usual = TopK(k=2).choose(parameters, inputs, 4)
    choice = fine_grained.WithoutBest(k=2, disabled=1).choose(parameters, inputs, 4)
    assert usual.experts.tolist() == [[0, 1]]
    assert choice.experts.tolist() == [[1, 2]]
    np.testing.assert_array_equal(choice.weights, usual.weights)


def test_disabling_experts_of_a_trained_run(data_dir, tmp_path):
    config = tiny_config(data_dir)
    config.steps, config.evaluation.every, config.mesh = 4, 0, MeshConfig()
    config.model.num_layers = config.model.moe_every = 1
    config.model.moe.router = TopK(k=2)
    config.model.moe.shared_experts = 1
    loop.train(config, tmp_path)
    trained = Trained.load(tmp_path)
    losses = [
        measured["eval/loss"]
        for measured in (
            measurements.test_split(trained),
            fine_grained.without_best(0.5).measure(trained),
            fine_grained.WITHOUT_SHARED.measure(trained),
        )
    ]
    assert np.isfinite(losses).all()
    assert len(set(losses)) == 3


def test_only_shared_experts_are_zeroed():
    def experts():
        return {"w_in": jnp.ones(2), "shared": {"dense": {"w_out": jnp.ones(3)}}}

    parameters = {"blocks": {0: {"mlp": experts()}}}
    (mlp,) = (block["mlp"] for block in fine_grained.without_shared(parameters)["blocks"].values())
    assert not mlp["shared"]["dense"]["w_out"].any()
    assert mlp["w_in"].all()
    assert jax.tree.all(jax.tree.map(jnp.all, parameters))  # The given ones are untouched.
