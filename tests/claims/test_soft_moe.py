"""Claim 7, Soft MoE: what it says of planted effects."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments.claims import _images, soft_moe
from moe_jax.reproduction.claim import Profile
from moe_jax.reproduction.results import FinishedRun
from moe_jax.reproduction.verdicts import Verdict, overall
from moe_jax.routing.soft import SoftMoE, SoftVariant
from tests.reproduction.synthetic import synthetic_results

BETTER = {soft_moe.SOFT: 4, soft_moe.EXPERT_CHOICE: 2, soft_moe.TOKEN_CHOICE: 1}


def planted(effect, noise=0.002, profile=Profile.CPU):
    """The dense twin is the worst, Soft MoE the best by 4 effects, ablations and fewer experts 2."""
    rng = np.random.default_rng(0)

    def run(side, seed):
        steps = 0 if side.name == soft_moe.DENSE_TWIN else BETTER.get(side.name, 2)
        test, ten_shot = 0.6 + effect * steps + rng.normal(size=2) * noise
        measured = {
            "test": {"eval/loss": 1.0, "eval/accuracy": test},
            soft_moe.FEW_SHOT.name: {"5": ten_shot - 0.1, "10": ten_shot},
        }
        return FinishedRun(seed, 1e-3, [], measured, None, 1.0)

    return synthetic_results(soft_moe.CLAIM, run, profile)


@pytest.mark.parametrize("profile", Profile)
@pytest.mark.parametrize(
    ("effect", "verdict"), [(0.02, Verdict.REPRODUCED), (-0.02, Verdict.CONTRADICTED)]
)
def test_a_planted_effect_is_found(effect, verdict, profile):
    found = soft_moe.findings(planted(effect, profile=profile))
    assert {finding.verdict for finding in found} == {verdict}
    assert overall(found) == verdict


def test_noise_is_no_effect():
    assert overall(soft_moe.findings(planted(0.0))) != Verdict.REPRODUCED


def test_a_run_that_diverged_is_right_nowhere():
    run = FinishedRun(0, 1e-3, [], {}, diverged_at=3, seconds=1.0)
    assert _images.test_accuracy(run) == soft_moe.ten_shot(run) == 0


@pytest.mark.parametrize("profile", Profile)
def test_configs_are_valid_and_have_as_many_slots_as_patches(profile):
    sides = {side.name: side.config(1e-3, 0) for side in soft_moe.sides(profile)}
    assert set(sides) > {*soft_moe.ROUTERS, *soft_moe.LADDER}
    for name, config in sides.items():
        config.validate()
        model = config.model
        if name == soft_moe.DENSE_TWIN:
            assert not model.moe_layers
            continue
        assert model.moe_layers == list(range(model.num_layers // 2, model.num_layers))
        for train in (True, False):
            slots = model.num_experts * model.moe.expert_capacity(model.num_experts, train)
            assert slots / model.moe.group_size == 1
        images = model.moe.group_size / model.num_tokens
        assert images == (1 if isinstance(model.moe.router, SoftMoE) else 8)
    assert sides["identity"].model.moe.router.variant == SoftVariant.IDENTITY


def test_the_table_has_no_empty_cell():
    made = soft_moe.table(planted(0.02))
    assert {len(row) for row in made.rows} == {len(made.columns)}
    assert all(cell for row in made.rows for cell in row)
    rows = {row[0]: row for row in made.rows}
    assert rows[soft_moe.SOFT][1] == "16 x 1"
    assert rows[soft_moe.with_experts(2)][1] == "2 x 8"


def test_the_picture(tmp_path):
    figure = Figure(layout="constrained")
    soft_moe.draw(planted(0.02), figure)
    figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 0
