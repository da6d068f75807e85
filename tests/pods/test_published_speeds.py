"""Published speeds: what is derived from the print, and how a roofline is set beside it."""

import pytest

from moe_jax.analysis.accounting.families import account
from moe_jax.pods import published_speeds
from moe_jax.pods.published_speeds import PUBLISHED_SPEEDS, PublishedSpeed
from moe_jax.reproduction.claim import read_config
from tests.pods.reports import report
from tests.scripts import ROOT

BY_MODEL = {speed.model: speed for speed in PUBLISHED_SPEEDS}


def speed(**changes):
    usual = {
        "model": "a model",
        "config": "configs/paper.py:model",
        "machine": "tpu-v5p-16",  # 8 chips, as `report()` has.
        "batch": 1600,
        "step": published_speeds.from_seconds(1.0),
        "source": "a paper",
        "explanation": "Because.",
    }
    return PublishedSpeed(**{**usual, **changes})


@pytest.mark.parametrize(
    ("step", "seconds"),
    [
        (published_speeds.from_rate(0.5), 2),
        # 100 batches of 10 tokens in 3,600 s.
        (published_speeds.from_run(1, 1000, 10), 36),
        # 4 devices were busy for 2 hours each: 7,200 s for 100 batches.
        (published_speeds.from_device_hours(8, 4, 1000, 10), 72),
        # 4 devices do 200 tokens a second.
        (published_speeds.from_throughput(50, 4, 1000), 5),
    ],
)
def test_seconds_are_what_the_formula_says(step, seconds):
    assert step.seconds == pytest.approx(seconds)
    plain = (
        step.formula.replace(" /s", "").replace(" steps/s", "").replace(" h", "").replace(" s", "")
    )
    assert eval(plain) == pytest.approx(seconds)


# Table 3 of GShard prints steps per second, core-years and days of a run of 1T tokens.
@pytest.mark.parametrize(
    ("experts", "layers", "batch", "core_years", "days"),
    [
        (2048, 36, 4e6, 22.4, 4.0),
        (2048, 12, 4e6, 7.5, 1.4),
        (512, 36, 1e6, 15.5, 11.0),
        (512, 12, 1e6, 4.9, 3.5),
        (128, 36, 1e6, 6.1, 17.3),
        (128, 12, 1e6, 1.9, 5.4),
    ],
)
def test_gshards_steps_add_up_to_its_core_years(experts, layers, batch, core_years, days):
    step = BY_MODEL[f"GShard MoE({experts}E, {layers}L)"].step.seconds
    run = 1e12 / batch * step / (24 * 3600)
    assert run == pytest.approx(days, rel=0.05)
    assert experts * run / 365.25 == pytest.approx(core_years, rel=0.05)


def test_glams_hours_are_those_of_its_steps():
    # 574 h * 3,600 s = 2,066,400 s for 280e9 / 2^20 = 267,029 steps.
    step = BY_MODEL["GLaM 64B/64E, first 280B tokens"].step.seconds
    assert step == pytest.approx(7.74, abs=0.005)


@pytest.mark.parametrize(
    ("model", "mfu"),
    [
        # https://arxiv.org/abs/2505.09343, Table 4: causal MFU of DeepSeek-V3's training.
        ("DeepSeek-V3 on 2,048 H800", 0.3894),
        # 52.56% with attention between all positions; without what a causal mask leaves out, by
        # hand: 2,909 tokens/s * 3 * 2 * 32 blocks * 4,096 wide * 4,096 / 2 * 2 products = 9.4e12,
        # which is 2.04% of 459e12.
        ("Mixtral 8x7B by MaxText, 52.6% MFU", 0.5256 - 0.0204),
    ],
)
def test_our_count_of_flops_gives_the_published_utilisation(model, mfu):
    published = BY_MODEL[model]
    config = read_config(str(ROOT / published.config))
    counted = account(config.model, config.data)
    tokens = config.data.batch_size * config.data.tokens_per_row
    ours = report(
        config=published.config,
        tokens_per_step=tokens,
        devices=1,
        algorithmic_flops_per_device=3 * counted.algorithmic_flops * tokens,
    )
    found = published_speeds.compare(published, ours)
    assert found.published_mfu == pytest.approx(mfu, rel=0.01)


def test_the_roofline_of_the_same_machine_and_batch_is_taken_as_it_is():
    found = published_speeds.compare(speed(), report())
    assert found.seconds == pytest.approx(0.4)
    assert found.seconds_without_overlap == pytest.approx(0.7)
    assert found.ratio == pytest.approx(2.5)
    # 8 * 0.6e12 FLOPs in 1 s, of 8 * 459e12 FLOP/s.
    assert found.published_mfu == pytest.approx(0.6 / 459)


def test_another_batch_and_machine_scale_it():
    # Half of the tokens, on 16 v6e of 918e12 FLOP/s, which are 4 times 8 v5p of 459e12.
    other = speed(batch=800, machine="v6e:4x4")
    found = published_speeds.compare(other, report())
    assert found.seconds == pytest.approx(0.4 / 2 / 4)
    assert found.hardware == "tpu-v5p-16"


def test_inference_is_a_third_of_the_training_steps_flops_at_the_peak():
    found = published_speeds.compare(speed(inference=True), report())
    assert found.seconds == pytest.approx(0.2e12 / 459e12)
    assert found.published_mfu == pytest.approx(0.2 / 459)


def test_a_step_that_does_not_fit_has_no_roofline():
    assert published_speeds.compare(speed(), report(fits=False, roofline=None)) is None


def test_the_report_of_the_published_machine_is_preferred():
    other, same = report(hardware="tpu-v5p-32"), report()
    unrelated = report(config="configs/paper.py:other")
    assert published_speeds.find(speed(), [unrelated, other, same]) is same
    assert published_speeds.find(speed(), [unrelated, other]) is other
    assert published_speeds.find(speed(), [unrelated]) is None


def test_the_table_has_a_line_and_a_note_for_each_speed_that_has_a_report():
    glam = report(
        config="configs/glam.py:64b_64e",
        topology="v4:8x8x16",
        hardware="tpu-v4-2048",
        devices=1024,
        tokens_per_step=2**20,
    )
    lines = published_speeds.table([glam]).splitlines()
    rows = [line for line in lines if line.startswith("| ")][1:]
    (row,), (note,) = rows, [line for line in lines if line.startswith("- **")]
    assert note.startswith("- **GLaM 64B/64E, first 280B tokens**: 574 h * 3600 s")
    assert f"Another {len(PUBLISHED_SPEEDS) - 1} speeds" in lines[-1]
    # 7.74 s / 0.4 s is 19.3.
    assert row.startswith(
        "| GLaM 64B/64E, first 280B tokens | tpu-v4-2048 | 7.74 | 0.4 | 0.7 | 19.3 |"
    )


def test_models_have_names_and_configs_of_their_own():
    assert len(BY_MODEL) == len(PUBLISHED_SPEEDS)
    for published in PUBLISHED_SPEEDS:
        assert read_config(str(ROOT / published.config)).steps > 0
