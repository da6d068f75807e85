"""The tiny Vision Transformer of configs/tiny/vision.py with Soft MoE in place of V-MoE.

8 experts of 2 slots for the 16 patches of an image, the mean of all patches is classified, queries and
keys are normalized.
"""

import dataclasses

from configs.tiny import vision
from moe_jax.layers.attention import MultiHead, Positions, QKNorm
from moe_jax.layers.moe import MoEConfig
from moe_jax.models.vision import Pooling
from moe_jax.routing.soft import SoftMoE
from moe_jax.training.experiment import Experiment


def get_config() -> Experiment:
    model = vision.backbone()
    model.pooling = Pooling.GAP
    model.attention = MultiHead(
        positions=Positions.NONE, qkv_bias=True, out_bias=True, qk_norm=QKNorm.HEAD
    )
    model.moe = MoEConfig(
        router=SoftMoE(slots_per_expert=2),
        group_size=16,
        experts=dataclasses.replace(model.feed_forward),
    )
    return vision.digits(model)
