"""V-MoE-15B: 32 experts in 24 of 48 blocks, 14705.1M parameters, ImageNet 90.35.

Riquelme et al. 2021, section 3 and appendix: 90.35 fine-tuned on ImageNet, and with 1, 5 and 10
images of each class 68.66, 82.78 and 84.29.

The printed number of parameters is that of 29,593 classes (a newer JFT) and no layer before the
head, unlike all other models of the paper, and of patches of 14 pixels. Trained with Adafactor and
an inverse square root schedule; its learning rate and steps were not at hand: those of H/14 are
here.
"""

import dataclasses

from configs.vmoe import backbones, jft
from moe_jax.analysis.published import Published, Quantity
from moe_jax.models.stack import Remat
from moe_jax.parallel.mesh import MeshConfig
from moe_jax.pods.layouts import PodLayout
from moe_jax.training.experiment import Experiment
from moe_jax.training.optimizers import Adafactor
from moe_jax.training.schedules import Schedule

PUBLISHED = (
    Published(
        Quantity.PARAMETERS,
        "14705.1M",
        "V-MoE, appendix",
        note="with 29,593 classes and no layer before the head; with those of the paper's other "
        "models it would be 14691.1M",
    ),
)

CLASSES = 29_593

PODS = (
    PodLayout(
        "v3:8x16",
        MeshConfig(data=8, expert=32),
        {"model.remat": Remat.FULL},
        note="the paper used TPU v3; this number of cores is ours",
    ),
)


def get_config() -> Experiment:
    size = backbones.Size(num_layers=48, width=1408, mlp_width=6400, num_heads=16)
    model = backbones.every_2(backbones.dense(size, 14, CLASSES), 32)
    experiment = jft.pretraining(
        dataclasses.replace(model, pre_logits=False), learning_rate=3e-4, epochs=14
    )
    experiment.optimizer = Adafactor(
        learning_rate=3e-4,
        schedule=Schedule.INVERSE_SQRT,
        warmup_steps=10_000,
        constant_steps=0,
        scale_by_parameters=False,
        weight_decay=0.1,
    )
    return experiment
