import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.reproduction.verdicts import Finding, Verdict, agree, compare, describe, overall

LOSSES = st.lists(st.floats(0, 10), min_size=3, max_size=6)


def verdict(larger, smaller, **arguments):
    return compare("", "", larger, smaller, **arguments).verdict


def test_a_difference_of_more_than_two_standard_errors_counts():
    low, error = [1.0, 1.1, 1.2], 0.1 / math.sqrt(3)
    for factor, expected in ((2.1, Verdict.REPRODUCED), (1.9, Verdict.NOT_RESOLVED)):
        high = [value + factor * math.hypot(error, error) for value in low]
        assert verdict(high, low) == expected
    assert verdict(low, [value + 1 for value in low]) == Verdict.CONTRADICTED


@given(first=LOSSES, second=LOSSES)
def test_the_opposite_claim_has_the_opposite_verdict(first, second):
    opposite = {
        Verdict.REPRODUCED: Verdict.CONTRADICTED,
        Verdict.CONTRADICTED: Verdict.REPRODUCED,
        Verdict.NOT_RESOLVED: Verdict.NOT_RESOLVED,
    }
    assert verdict(second, first) == opposite[verdict(first, second)]


def test_null_effects_are_seldom_resolved():
    """With three seeds a difference of two estimated standard errors is no rare thing: one in nine."""
    draws = np.random.default_rng(0).normal(size=(2000, 2, 3))
    resolved = np.mean([verdict(a, b) != Verdict.NOT_RESOLVED for a, b in draws])
    assert 0.08 < resolved < 0.15


def test_a_margin_is_what_a_claim_means_at_least():
    assert verdict([1.01, 1.01], [1.0, 1.0]) == Verdict.REPRODUCED
    assert verdict([1.01, 1.01], [1.0, 1.0], margin=0.05) == Verdict.NOT_RESOLVED


def test_not_resolved_says_how_many_seeds_it_would_take():
    """Deviation 1 on both sides and a difference of 0.1: 2 sqrt(2 / n) < 0.1 from n = 800 on."""
    finding = compare("", "", [-1.0, 0.0, 1.0], [-1.1, -0.1, 0.9])
    assert finding.verdict == Verdict.NOT_RESOLVED
    assert finding.needs == "about 800 seeds for a difference of this size"
    assert compare("", "", [1.0, 1.0], [2.0, 2.0]).needs == ""
    assert "more than" in compare("", "", [-1.0, 0.0, 1.0], [-1.0, 0.0, 1.0001]).needs
    opposite = compare("", "", [-1.1, -0.1, 0.9], [-1.0, 0.0, 1.0])
    assert opposite.needs == f"{finding.needs} (it is against the claim)"


def test_diverged_runs_are_worse_than_all_others():
    inf = math.inf
    assert verdict([inf, inf, inf], [1.0, 1.1, 1.2]) == Verdict.REPRODUCED
    assert verdict([1.0, 1.1, 1.2], [inf, inf, inf]) == Verdict.CONTRADICTED
    mixed = compare("", "", [inf, inf, 1.0], [1.0, 1.1, 1.2])
    assert mixed.verdict == Verdict.NOT_RESOLVED
    assert "2 of 3 seeds diverged" in mixed.ours


def test_samples_that_are_all_the_same_need_another_setting():
    """Such as the seeds that diverged, where none does on either side."""
    found = compare("", "", [0.0, 0.0, 0.0], [0.0, 0.0, 0.0])
    assert found.verdict == Verdict.NOT_RESOLVED
    assert found.needs == "a setting in which they differ: all values are the same"


@pytest.mark.parametrize("samples", [([], [1.0]), ([1.0], []), ([math.nan], [1.0])])
def test_samples_without_numbers_are_errors(samples):
    with pytest.raises(ValueError, match="each needs numbers"):
        compare("a claim", "", *samples)


@pytest.mark.parametrize(
    ("estimate", "error", "expected"),
    [
        (0.1084, 0.001, Verdict.REPRODUCED),
        (0.1084, 0.06, Verdict.NOT_RESOLVED),
        (0.12, 0.001, Verdict.CONTRADICTED),
        (0.1104, 0.001, Verdict.REPRODUCED),  # Within 0.002 and the rounding.
        (0.1106, 0.001, Verdict.CONTRADICTED),
    ],
)
def test_agreement_with_a_printed_number(estimate, error, expected):
    assert agree("", "", 0.108, estimate, error, rounding=0.0005).verdict == expected


def test_overall():
    def of(*verdicts):
        return overall([Finding("", "", "", v) for v in verdicts])

    assert of(Verdict.REPRODUCED, Verdict.REPRODUCED) == Verdict.REPRODUCED
    assert of(Verdict.REPRODUCED, Verdict.NOT_RESOLVED) == Verdict.NOT_RESOLVED
    assert of(Verdict.NOT_RESOLVED, Verdict.CONTRADICTED) == Verdict.CONTRADICTED
    aside = compare("", "", [1.0, 1.0], [2.0, 2.0], decisive=False)
    assert overall([aside, Finding("", "", "", Verdict.REPRODUCED)]) == Verdict.REPRODUCED


def test_described():
    assert describe([2.5]) == "2.5"
    assert describe([1.0, 2.0, 3.0]) == "2 ± 0.58 (3 seeds)"


def test_the_difference_of_each_seed_is_shown():
    found = compare("a", "b", [2.0, 3.5, 4.0], [1.0, 2.0, 3.0])
    assert found.ours.endswith("(by seed 1, 1.5, 1)")
    assert "by seed" not in compare("a", "b", [2.0, 3.0], [1.0]).ours


def test_samples_over_other_things_than_seeds_are_not_paired():
    found = compare("a", "b", [2.0, 3.5], [1.0, 2.0], over="sizes")
    assert found.ours.startswith("2.75 ± 0.75 (2 sizes) against 1.5 ± 0.5 (2 sizes)")
    assert "by seed" not in found.ours
