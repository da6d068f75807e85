import dataclasses

import pytest

from moe_jax.pods.budgets import violations
from tests.pods.reports import COLLECTIVE, MEMORY, report


def test_a_step_within_its_budget_violates_nothing():
    assert violations(report(), report()) == []
    assert violations(report(), None) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"fits": False, "refusal": "no room", "roofline": None, "collectives": ()},
            "does not fit: no room",
        ),
        ({"flops_per_device": 0.96e12}, "0.941 of the FLOPs"),
        ({"flops_per_device": 1.08e12}, "1.059 of the FLOPs"),
    ],
)
def test_fit_and_flops_are_looked_at_with_every_compiler(changes, message):
    (found,) = violations(report(**changes), None)
    assert message in found


def test_memory_may_differ_by_a_twentieth():
    # 315 + 15 is 1.048 of the budget, 315 + 16 is 1.051; less is a stale budget.
    def found(temporaries):
        hbm = dataclasses.replace(MEMORY, temporaries=temporaries)
        return violations(report(hbm=hbm), report())

    assert found(215) == [] and found(185) == []
    assert "1.051 of the budget" in found(216)[0]
    assert "0.949 of the budget" in found(184)[0]
    assert violations(report(hbm=dataclasses.replace(MEMORY, temporaries=216)), None) == []


@pytest.mark.parametrize("field", ["kind", "axes", "count", "bytes"])
def test_collectives_must_be_the_budgets(field):
    other = {"kind": "all-gather", "axes": ("data",), "count": 9, "bytes": 4097}[field]
    changed = report(collectives=(dataclasses.replace(COLLECTIVE, **{field: other}),))
    has, lacks = violations(changed, report())
    assert "that the budget lacks" in has
    assert lacks == "it lacks a collective of the budget: 8 x all-to-all over expert, 4,096 bytes."
    assert violations(changed, None) == []
