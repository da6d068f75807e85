"""Steps of small models, compiled by libtpu. Run by `make test-tpu`."""

import dataclasses

import jax
import pytest

from configs import quickstart
from moe_jax.parallel.mesh import MeshConfig
from moe_jax.pods.compile import compile_step, refusal_sentence
from moe_jax.pods.hardware import topology

pytestmark = pytest.mark.tpu


def compiled(machine, mesh, **model):
    jax.config.update("jax_disable_most_optimizations", False)  # The other tests' setting.
    config = quickstart.get_config()
    config.mesh, config.model = mesh, dataclasses.replace(config.model, **model)
    return compile_step(config, topology(machine), name="mine", changes={"seed": 0})


@pytest.fixture(scope="module")
def report():
    return compiled("v5e:2x2", MeshConfig(data=2, expert=2))


def test_a_report_names_the_machine_and_the_model(report):
    assert (report.chips, report.devices, report.compiled_for) == (4, 4, "tpu")
    assert report.mesh == {"data": 2, "expert": 2, "model": 1}
    assert report.compiler.startswith("libtpu 0.")
    config = quickstart.get_config()
    assert report.tokens_per_step == config.data.batch_size * config.data.sequence_length
    assert report.fits and report.exact
    assert report.changes == {"seed": 0}


def test_flops_are_those_of_the_accounting(report):
    assert report.flops_per_device == pytest.approx(report.accounted_flops_per_device, rel=0.05)
    assert report.algorithmic_flops_per_device < report.flops_per_device


def test_memory_is_the_states(report):
    # AdamW keeps two moments of float32 for each parameter; what is split is not on every device.
    assert report.hbm.optimizer_state == pytest.approx(2 * report.hbm.parameters, rel=0.01)
    assert 4 * report.params / 4 < report.hbm.parameters < 4 * report.params
    state = report.hbm.parameters + report.hbm.optimizer_state
    assert state < report.hbm.arguments < 1.5 * state


def test_experts_exchange_tokens_over_their_axis(report):
    (exchange,) = (one for one in report.collectives if one.kind == "all-to-all")
    # Two MoE blocks, there and back, forward and backward.
    assert (exchange.axes, exchange.count) == (("expert",), 8)
    assert exchange.seconds > 0


def test_the_roofline_is_its_slowest_term(report):
    line = report.roofline
    terms = (line.compute, line.memory, line.interconnect, line.network)
    assert line.step_seconds == max(terms) == getattr(line, line.binding)
    assert line.network == 0
    assert 0 < line.mfu_without_overlap < line.mfu < 1
    assert line.tokens_per_second_per_chip == pytest.approx(
        report.tokens_per_step / line.step_seconds / 4
    )


def test_two_slices_talk_over_the_network():
    report = compiled("2*v5e:2x2", MeshConfig(data=4, expert=2))
    assert (report.chips, report.fits) == (8, True)
    assert report.roofline.network > 0
    crossing = [one for one in report.collectives if "data" in one.axes]
    assert crossing and any(one.kind == "all-to-all" for one in report.collectives)


def test_a_step_that_does_not_fit_says_by_how_much_and_why():
    # 2 layers x 64 experts x 2 matrices of 4096 x 16384, and two moments: 192 GiB over 4 chips.
    report = compiled("v5e:2x2", MeshConfig(expert=4), num_experts=64, mlp_width=16384, width=4096)
    assert not report.fits and report.roofline is None
    sentence = refusal_sentence(report)
    assert "mine does not fit on tpu-v5e-4: a device needs at least 48." in sentence
    assert "GiB and has 15.8" in sentence and "most of it is optimizer state" in sentence
