"""The scaling law and its fit, on models that obey a law exactly or with noise."""

import math

import numpy as np
import pytest

from moe_jax.analysis.scaling_law import (
    Law,
    Models,
    bootstrap,
    fit_bilinear,
    fit_saturating,
    saturated,
    slope,
)

SATURATING = Law(-0.083, -0.12, 0.010, 1.11, 2.0, 300.0)
BILINEAR = Law(-0.083, -0.12, 0.010, 1.11)


def models_of(law, noise=0.0):
    """Six sizes with 1 to 512 experts; noise is the deviation of log10 L."""
    N, E = (x.ravel() for x in np.meshgrid(np.geomspace(1.6e7, 1.3e9, 6), 2.0 ** np.arange(10)))
    errors = np.random.default_rng(0).normal(scale=noise, size=N.size)
    return Models(N, E, law.loss(N, E) * 10**errors)


def test_the_law_is_the_papers_equation():
    N, E, law = 1e8, 16, SATURATING
    hat = 1 / (1 / (E - 1 + 1 / (1 / 2 - 1 / 300)) + 1 / 300)
    n, e = math.log10(N), math.log10(hat)
    expected = law.a * n + law.b * e + law.c * n * e + law.d
    assert math.log10(law.loss(N, E)) == pytest.approx(expected)


def test_experts_saturate_between_start_and_maximum():
    E = np.array([1.0, 64.0, 1e9])
    assert saturated(E, 2.0, 300.0)[[0, 2]] == pytest.approx([2, 300])
    assert saturated(E, 1.0, math.inf) == pytest.approx(E)


def test_at_the_cutoff_experts_make_no_difference():
    N = BILINEAR.cutoff()
    assert BILINEAR.loss(N, 512) == pytest.approx(float(BILINEAR.loss(N, 1)))
    assert Law(-0.08, -0.1, -0.01, 1.1).cutoff() == math.inf


@pytest.mark.parametrize(
    ("law", "fit"),
    [(BILINEAR, fit_bilinear), (SATURATING, fit_saturating)],
    ids=["bilinear", "saturating"],
)
def test_the_fit_finds_the_law(law, fit):
    found = fit(models_of(law))
    assert [found.a, found.b, found.c, found.d] == pytest.approx([law.a, law.b, law.c, law.d], 1e-3)
    assert (found.E_start, found.E_max) == pytest.approx((law.E_start, law.E_max), rel=1e-2)
    assert found.error(models_of(law)) < 1e-6


def test_resampled_fits_scatter_around_the_law():
    samples = bootstrap(models_of(BILINEAR, 0.003), fit_bilinear, 200, np.random.default_rng(1))
    b = [law.b for law in samples]
    low, high = np.quantile(b, [0.005, 0.995])
    assert low < BILINEAR.b < high
    assert 0 < high - low < 0.1


def test_the_slope_is_that_of_the_law():
    N, E = 1e8, 2.0 ** np.arange(5)
    found = slope(Models(np.full(5, N), E, BILINEAR.loss(N, E)))
    assert found == pytest.approx(BILINEAR.b + BILINEAR.c * math.log10(N))
