"""Different MoE settings for different layers."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_jax as moe
from moe_jax import configuration
from moe_jax.analysis.accounting.families import account
from moe_jax.models.stack import MoERule, StackConfig, Stage, stages_of
from tests.tiny import tiny_config

HASH = moe.MoEConfig(router=moe.HashRouter(vocab_size=264))


def config_of(**fields):
    return StackConfig(num_layers=4, moe_every=1, num_experts=4, **fields)


def test_the_last_rule_that_names_a_block_counts():
    top2 = moe.MoEConfig(router=moe.TopK(k=2))
    config = config_of(moe_rules=(MoERule((0, 1), HASH), MoERule((1,), top2)))
    assert [config.rule_of(block) for block in range(4)] == [0, 1, -1, -1]
    assert [type(config.moe_of(config.rule_of(b)).router).__name__ for b in range(4)] == [
        "HashRouter", "TopK", "TopK", "TopK"
    ]  # fmt: skip
    assert config.stages == [Stage(0, (4,), 1, 0), Stage(1, (4,), 1, 1), Stage(2, (4,), 2, -1)]


def test_groups_are_those_of_all_layers():
    config = config_of(moe=moe.MoEConfig(group_size=64), moe_rules=(MoERule((0,), HASH),))
    assert config.moe_of(0).group_size == 64
    assert config.moe_settings[1].router == HASH.router


def test_stages_without_rules_are_as_before():
    assert stages_of([0, 8] * 3) == [Stage(0, (0, 8), 3)]
    assert stages_of([0, 8] * 2, [-1, 0] * 2) == [Stage(0, (0, 8), 2, 0)]
    assert stages_of([8, 8, 8], [0, -1, -1]) == [Stage(0, (8,), 1, 0), Stage(1, (8,), 2)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"moe_rules": (MoERule((), HASH),)}, r"model.moe_rules\[0\].blocks is \(\); it must name"),
        (
            {"moe_rules": (MoERule((4,), HASH),)},
            r"blocks is \(4,\); it must name some .*0, 1, 2, 3",
        ),
        (
            {"moe_rules": (MoERule((0,), dataclasses.replace(HASH, group_size=8)),)},
            "group_size is 8, but all layers route in the same groups",
        ),
        ({"moe_rules": (MoERule((0,), moe.MoEConfig(router=moe.TopK(k=9))),)}, "router.k is 9"),
        ({"moe_every": 0, "moe_rules": (MoERule((0,), HASH),)}, "moe_rules is .*a dense model"),
    ],
)
def test_rules_that_cannot_be_are_refused(fields, message):
    config = dataclasses.replace(config_of(), **fields)
    with pytest.raises(moe.UserError, match=message):
        config.validate()


def test_a_leak_in_any_layer_is_refused():
    config = moe.DecoderLMConfig(moe_rules=(MoERule((1,), moe.MoEConfig(router=moe.BASE())),))
    with pytest.raises(moe.UserError, match="BASE, with which a decoder would look ahead"):
        config.validate()


def test_hash_routing_in_the_first_layer_trains_and_is_counted(data_dir, tmp_path):
    config = tiny_config(data_dir)
    config.steps = 2
    config.model.moe_every = 1
    config.model.moe_rules = (MoERule((0,), moe.MoEConfig(router=moe.HashRouter(vocab_size=264))),)
    again = configuration.decode(json.loads(json.dumps(configuration.encode(config))))
    assert again == config
    records = moe.train(config, tmp_path / "run")
    last = records[-1]
    assert "router/1/load_balancing_loss" in last
    assert "router/0/load_balancing_loss" not in last
    assert sum(last["router/0/load"]) == pytest.approx(1)
    counted = config.with_group_sizes()
    parameters = account(counted.model, counted.data).parameters
    shapes = jax.eval_shape(lambda: config.model.build(jax.random.key(0)))
    assert parameters == sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    assert moe.evaluate(tmp_path / "run")["eval/loss"] == pytest.approx(last["eval/loss"], rel=1e-6)


def test_layers_with_other_choices_have_other_loads():
    config = moe.DecoderLMConfig(
        num_layers=2, width=16, num_heads=2, head_width=8, mlp_width=32, num_experts=4, moe_every=1,
        vocab_size=32, max_length=16, moe_rules=(MoERule((1,), moe.MoEConfig(router=moe.TopK(k=2))),),
    )  # fmt: skip
    config.validate()
    model = config.build(jax.random.key(0))
    tokens = jnp.arange(32).reshape(2, 16)
    _, reports, _ = jax.jit(lambda tokens: model(tokens, None, moe.Mode.EVALUATE))(tokens)
    assert [float(report.statistics["load"].sum()) for report in reports] == pytest.approx([1, 2])
