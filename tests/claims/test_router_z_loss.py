"""Claim 3, router z-loss: what it says of planted effects."""

import math

import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments.claims import _text, router_z_loss
from moe_jax.reproduction.claim import Profile, read_config
from moe_jax.reproduction.results import FinishedRun
from moe_jax.reproduction.verdicts import Verdict, overall
from tests.reproduction.synthetic import synthetic_results

NOISE = (0.003, -0.004, 0.001)


def run_with(logsumexp, loss, seed=0):
    """A run whose squared logsumexp goes from (ln 8)^2 to a value, half a unit apart in two layers."""
    records = []
    for step in range(20, 801, 20):
        mean = 4.3 + (logsumexp - 4.3) * min(1.0, step / 400)
        layers = {
            f"router/{i}/logsumexp_squared": mean + offset for i, offset in ((0, -0.5), (1, 0.5))
        }
        records.append({"step": step, "train/loss": loss + 80 / step, **layers})
    return FinishedRun(seed, 8e-3, records, {"test": {"eval/loss": loss}}, None, 1.0)


def planted(logsumexp, cost):
    """Given by c_z: the squared logsumexp at the end, and what the test loss is above 2."""

    def run(side, seed):
        c = float(side.name.removeprefix("c_z = "))
        noise = NOISE[(seed + len(side.name)) % 3]
        return run_with(logsumexp(c) + noise, 2 + cost(c) + noise, seed)

    return synthetic_results(router_z_loss.CLAIM, run)


LIKE_THE_PAPER = {"logsumexp": lambda c: 12 / (1 + c / 1e-3), "cost": lambda c: 0.0}
REVERSED = {"logsumexp": lambda c: 12 * (1 + c / 1e-3), "cost": lambda c: 100 * c}
NULL = {"logsumexp": lambda c: 12.0, "cost": lambda c: 0.0}


@pytest.mark.parametrize(
    ("effect", "verdict"),
    [(LIKE_THE_PAPER, Verdict.REPRODUCED), (REVERSED, Verdict.CONTRADICTED)],
)
def test_a_planted_effect_is_found(effect, verdict):
    found = router_z_loss.findings(planted(**effect))
    assert {finding.verdict for finding in found} == {verdict}


def test_noise_is_no_effect():
    assert overall(router_z_loss.findings(planted(**NULL))) == Verdict.NOT_RESOLVED


def test_the_logsumexp_is_a_mean_over_layers_and_the_end_of_training():
    run = run_with(12.0, 2.0)
    steps, values = router_z_loss.logsumexp_squared(run)
    np.testing.assert_array_equal(steps, np.arange(20, 801, 20))
    assert values[9] == pytest.approx(4.3 + (12 - 4.3) / 2)
    assert router_z_loss.logsumexp_at_end(run) == pytest.approx(12.0)
    diverged = FinishedRun(0, 8e-3, run.records, {}, 800, 1.0)
    assert router_z_loss.logsumexp_at_end(diverged) == math.inf


def test_the_table_has_no_empty_cell():
    made = router_z_loss.table(planted(**LIKE_THE_PAPER))
    assert {len(row) for row in made.rows} == {len(made.columns)}
    assert all(cell for row in made.rows for cell in row)


def test_the_picture(tmp_path):
    figure = Figure(layout="constrained")
    router_z_loss.draw(planted(**LIKE_THE_PAPER), figure)
    figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 0


@pytest.mark.parametrize("profile", Profile)
def test_configs_are_valid(profile):
    sides = router_z_loss.sides(profile)
    for side, coefficient in zip(sides, router_z_loss.COEFFICIENTS, strict=True):
        config = side.config(8e-3, 0)
        config.validate()
        assert config.model.moe.router.losses.router_z == coefficient
    default = read_config(_text.FILES[profile])
    assert sides[0].config(default.optimizer.learning_rate, default.seed) == default
