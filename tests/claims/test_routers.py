"""Claim 5: what it says of planted effects."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments.claims import routers
from moe_jax.reproduction.claim import Profile
from moe_jax.reproduction.results import FinishedRun
from moe_jax.reproduction.verdicts import Verdict, overall
from tests.reproduction.synthetic import synthetic_results

QUALITY = {  # 0 for the dense twin, 1 for the best learned router, as the papers have it.
    routers.DENSE_TWIN: 0.0,
    routers.RANDOM: 0.1,
    routers.HASH_RANDOM: 0.6,
    routers.HASH_MODULO: 0.6,
    routers.SWITCH: 1.0,
    routers.BASE_AUCTION: 1.0,
    routers.S_BASE: 1.0,
}


def planted(effect, profile=Profile.CPU):
    """The loss falls by `effect` times the side's quality."""
    rng = np.random.default_rng(0)

    def run(side, seed):
        loss = 2 - effect * QUALITY[side.name] + rng.normal() * 0.003
        load = {} if side.name == "dense" else {"router/0/max_over_mean_load": 1.5}
        records = [
            {"step": step, "train/loss": loss, "eval/loss": loss + 100 / step, **load}
            for step in (200, 400, 600, 800)
        ]
        return FinishedRun(seed, 8e-3, records, {"test": {"eval/loss": loss}}, None, 1.0)

    return synthetic_results(routers.CLAIM, run, profile)


@pytest.mark.parametrize(
    ("effect", "verdict"), [(0.1, Verdict.REPRODUCED), (-0.1, Verdict.CONTRADICTED)]
)
def test_a_planted_effect_is_found(effect, verdict):
    found = routers.findings(planted(effect))
    assert {finding.verdict for finding in found} == {verdict}
    assert overall(found) == verdict


def test_noise_is_no_effect():
    assert overall(routers.findings(planted(0.0))) != Verdict.REPRODUCED


def test_imbalance_is_of_the_second_half():
    records = [{"step": i, "router/0/max_over_mean_load": r} for i, r in enumerate([8, 8, 2, 4])]
    records += [{"step": 4, "eval/loss": 1.0}]
    assert routers.imbalance(FinishedRun(0, 1e-3, records, {}, None, 1.0)) == 3
    assert routers.imbalance(FinishedRun(0, 1e-3, [], {}, 3, 1.0)) == np.inf


@pytest.mark.parametrize("profile", Profile)
def test_configs_are_valid(profile):
    for side in routers.sides(profile):
        config = side.config(1e-3, 0)
        config.validate()
        assert side.name == "dense" or config.model.moe.dispatch.dropless


def test_the_table_has_no_empty_cell():
    made = routers.table(planted(0.1))
    assert {len(row) for row in made.rows} == {len(made.columns)}
    assert all(cell for row in made.rows for cell in row)


def test_the_picture(tmp_path):
    figure = Figure(layout="constrained")
    routers.draw(planted(0.1), figure)
    figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 0
