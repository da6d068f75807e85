"""A whole training step compiled for GPUs. Run by `make test-gpu`."""

import re

import pytest

from configs import olmoe
from moe_jax.analysis.hlo import Program
from moe_jax.data.subword_tokenizer import Subword
from moe_jax.parallel.mesh import MeshConfig
from moe_jax.pods import compile as pods_compile
from moe_jax.pods.hardware import topology
from tests.gpu.programs import CUDNN, CUDNN_BACKWARD, MOSAIC, TRITON, kernels

pytestmark = pytest.mark.gpu

EXPERTS, MESH = 16, MeshConfig(data=2, expert=4)


def small_olmoe():
    """Two of its blocks, of a quarter of the widths and experts."""
    config = olmoe.decoder()
    config.mesh = MESH
    model, data = config.model, config.data
    model.num_layers, model.width, model.mlp_width = 2, 512, 256
    model.num_heads, model.num_experts, model.vocab_size = 4, EXPERTS, 512
    model.max_length = model.moe.group_size = data.sequence_length = 1024
    data.batch_size, data.tokenizer = 16, Subword(vocab_size=500)
    return config


@pytest.fixture(scope="module")
def compiled():
    """(report, text of the program)."""
    texts = []

    def remembered(text):
        texts.append(text)
        return Program(text)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pods_compile, "Program", remembered)
        report = pods_compile.compile_step(small_olmoe(), topology("h100:1x8"))
    return report, texts[0]


def test_the_report_is_of_gpus(compiled):
    report, _ = compiled
    assert (report.compiled_for, report.topology, report.hardware) == (
        "gpu", "h100:1x8", "gpu-h100-8",
    )  # fmt: skip
    assert report.compiler.startswith("jax-cuda12-pjrt 0.")
    # JAX takes three quarters of an H100's 79.1 GiB.
    assert report.hbm.capacity == int(0.75 * 84_942_979_072)
    assert report.fits and report.exact


def test_flops_are_those_of_the_accounting(compiled):
    report, _ = compiled
    assert report.flops_per_device == pytest.approx(report.accounted_flops_per_device, rel=0.01)
    # Recomputation and masked scores come on top.
    assert report.algorithmic_flops_per_device < report.flops_per_device


def test_attention_is_cudnns_and_experts_are_kernels(compiled):
    _, text = compiled
    found = kernels(text)
    assert CUDNN in found and CUDNN_BACKWARD in found
    grouped = [one for one in found if one in (MOSAIC, TRITON)]
    # Three matrices of an expert: forward, recomputed, and two gradients of each.
    assert len(grouped) >= 12


def test_no_device_multiplies_all_rows_by_all_experts(compiled):
    """Nor holds [E, R, d]: nothing has its experts' number in front of its rows."""
    _, text = compiled
    experts = EXPERTS // MESH.expert
    balanced = 16 * 1024 * 8 // MESH.size
    held = {int(rows) for rows in re.findall(rf"\w+\[{experts},(\d+),\d+\]", text)}
    assert held and max(held) < balanced


def test_the_new_state_takes_the_place_of_the_old(compiled):
    report, _ = compiled
    left = report.hbm.outputs - report.hbm.aliased
    assert left < 16_384, "more than the metrics is written anew"


def test_no_collective_keeps_a_device_waiting_but_the_ragged_exchange(compiled):
    """Under the launchers' flags; what is smaller than a kilobyte, such as counts of rows, does not matter.

    `jax.lax.platform_dependent` leaves the exchange alone in a branch, where nothing can overlap with it.
    """
    report, _ = compiled
    large = [one for one in report.collectives if one.bytes > 1024 * one.count]
    assert {one.kind for one in large if one.synchronous} <= {"ragged-all-to-all"}
    assert sum(one.synchronous for one in report.collectives) < 0.25 * sum(
        one.count for one in report.collectives
    )


def test_the_roofline_has_nvlink_and_no_network_within_a_host(compiled):
    report, _ = compiled
    line = report.roofline
    assert line.interconnect > 0 and line.network == 0
    assert line.step_seconds == max(line.compute, line.memory, line.interconnect)
    assert 0 < line.mfu_without_overlap < line.mfu < 1
