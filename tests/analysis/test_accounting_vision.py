"""FLOPs of Vision Transformers against XLA's count and against what Soft MoE's paper prints."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from configs.soft_moe import ROWS
from moe_jax.analysis.accounting.vision import account
from moe_jax.layers.mode import Mode
from moe_jax.layers.moe import MoEConfig
from moe_jax.models.abstract_model import AbstractModel
from moe_jax.models.vision import Pooling, VisionConfig
from moe_jax.routing.soft import SoftMoE

SMALL = VisionConfig(
    num_layers=2, width=128, num_heads=4, head_width=32, mlp_width=512, num_experts=4, image_size=32,
    patch_size=4, num_classes=100, pre_logits=True, unroll=True,
)  # fmt: skip
V_MOE = dataclasses.replace(SMALL, moe=dataclasses.replace(SMALL.moe, group_size=65))
SOFT_MOE = dataclasses.replace(
    SMALL,
    pooling=Pooling.GAP,
    moe=MoEConfig(SoftMoE(slots_per_expert=8), group_size=64, experts=SMALL.feed_forward),
)


def lowered_forward(config, images, mode):
    abstract_model = AbstractModel.of(config)
    shape = (images, config.image_size, config.image_size, config.channels)

    def forward(parameters, x):
        return abstract_model.merge(parameters)(x, None, mode)

    batch = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.jit(forward).lower(abstract_model.shapes, batch)


def test_flops_by_hand():
    """Blocks of 4 d^2 + 2 d f, a sparse one of capacity ceil-to-4(round(65 * 2 * 1.05 / 4)) = 36."""
    d, f, tokens = 128, 512, 65
    attention, mlp = 4 * d * d, 2 * d * f
    ends = 64 * 4 * 4 * 3 * d + d * d + d * 100
    dense = tokens * (2 * attention + mlp) + ends
    scores = 2 * 2 * tokens * tokens * d
    counted = account(V_MOE)
    assert counted.unit == "image"
    assert counted.algorithmic_flops == 2 * (dense + scores + tokens * 2 * mlp)
    assert counted.executed_flops == 2 * (dense + scores + 4 * 36 * mlp + tokens * d * 4)
    soft = account(SOFT_MOE)
    tokens, slots = 64, 32
    dense = tokens * (2 * attention + mlp) + ends
    scores = 2 * 2 * tokens * tokens * d
    mixtures = 3 * tokens * slots * d
    assert soft.executed_flops == soft.algorithmic_flops
    assert soft.executed_flops == 2 * (dense + scores + slots * mlp + mixtures)


@pytest.mark.parametrize("config", [V_MOE, SOFT_MOE], ids=["V-MoE", "Soft MoE"])
def test_executed_flops_equal_what_xla_counts(config):
    counted = lowered_forward(config, 2, Mode.TRAIN).compile().cost_analysis()["flops"] / 2
    # XLA also counts norms, softmax and GELU; products are all of ours.
    assert 1.0 <= counted / account(config).executed_flops < 1.03


@pytest.mark.parametrize(("row", "printed"), [("vit_s16", 9.2), ("soft_s16_128e", 8.6)])
def test_soft_moe_prints_what_xla_counts_before_it_optimizes(row, printed):
    """Table 8, GFLOPs of one image: products, and norms, softmax and GELU."""
    config = dataclasses.replace(ROWS[row].build().model, unroll=True)
    counted = lowered_forward(config, 1, Mode.EVALUATE).cost_analysis()["flops"]
    assert round(counted / 1e9, 1) == printed
