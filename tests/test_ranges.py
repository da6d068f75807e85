"""Ranges stand in the field, and the walker over a config checks them all."""

import dataclasses

import pytest

import moe_jax as moe
from moe_jax import configuration
from moe_jax.component import Component, Range, field
from moe_jax.models.stack import MoERule
from moe_jax.training.optimizers import SGD
from tests.tiny import tiny_config


@dataclasses.dataclass
class Base(Component):
    count: int = field(1, at_least=1)
    rate: float = field(0.5, above=0, at_most=1)
    share: float = field(0.0, at_least=0, below=1)


@dataclasses.dataclass
class Derived(Base):
    count: int = 8


@pytest.mark.parametrize(
    ("component", "message"),
    [
        (Base(count=0), "config.count is 0; it must be at least 1"),
        (Derived(count=0), "config.count is 0; it must be at least 1"),
        (Base(rate=0.0), r"config.rate is 0.0; it must be in \(0, 1\]"),
        (Base(rate=1.5), r"config.rate is 1.5; it must be in \(0, 1\]"),
        (Base(share=1.0), r"config.share is 1.0; it must be in \[0, 1\)"),
        (Base(share=float("nan")), "config.share is nan; it must be a finite number"),
        (Base(share=float("-inf")), "config.share is -inf; it must be a finite number"),
    ],
)
def test_a_value_out_of_range_is_one_sentence(component, message):
    with pytest.raises(moe.UserError, match=message):
        configuration.check_types(component)


def test_bounds_are_in_the_range_or_not_as_they_say():
    configuration.check_types(Base(rate=1, share=0))
    assert Range(at_least=0).holds(0) and not Range(above=0).holds(0)
    assert Range(at_most=1).holds(1) and not Range(below=1).holds(1)
    assert str(Range(above=0)) == "above 0" and str(Range(at_least=2)) == "at least 2"
    assert not Range(at_least=0).holds(float("nan"))


def test_every_float_of_a_run_refuses_infinity_and_nan():
    """All of them: what is not finite trains in silence or saves what nothing can go on from."""
    config = tiny_config("")
    floats = [
        (path, part, f.name)
        for path, part in configuration.components(config)
        for f in dataclasses.fields(part)
        if isinstance(getattr(part, f.name), float)
    ]
    assert len(floats) > 20
    for path, part, name in floats:
        before = getattr(part, name)
        for value in (float("inf"), float("-inf"), float("nan")):
            setattr(part, name, value)
            with pytest.raises(moe.UserError, match=rf"{path}.{name} is -?(inf|nan); it must be"):
                config.validate()
        setattr(part, name, before)


def test_components_in_tuples_are_checked_too():
    config = tiny_config("")
    config.model.moe_rules = (MoERule((1,), moe.MoEConfig(expert_dropout=2.0)),)
    with pytest.raises(moe.UserError, match=r"model.moe_rules\[0\].moe.expert_dropout is 2.0"):
        config.validate()


def test_a_component_alone_checks_its_own_ranges():
    with pytest.raises(moe.UserError, match=r"optimizer.momentum is 1.0; it must be in \[0, 1\)"):
        SGD(momentum=1.0).validate()
    with pytest.raises(moe.UserError, match=r"moe.expert_dropout is 1.0; it must be in \[0, 1\)"):
        moe.MoEConfig(expert_dropout=1.0).validate(8)
