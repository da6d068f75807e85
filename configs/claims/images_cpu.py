"""The Vision Transformer of the claims about images, sized for a core of a CPU: minutes a run.

Four blocks of width 64 on 49 patches of 4 x 4 pixels and a class token, every second with 8 experts
of which a patch takes one, so that `--config.model.moe_every=0` is the dense twin of equal FLOPs.
Groups are 8 images, as V-MoE's. Prepare the images first:

    python experiments/prepare_data.py --dataset=fashion_mnist
"""

import dataclasses

from moe_jax.data.images import ImageData
from moe_jax.layers.moe import MoEConfig
from moe_jax.models.vision import VisionConfig
from moe_jax.routing.capacity import Capacity, CapacityRule
from moe_jax.routing.token_choice import VMoE
from moe_jax.tasks.image_classification import ImageClassification
from moe_jax.training.experiment import Checkpointing, Evaluation, Experiment, Logging
from moe_jax.training.optimizers import AdamW


def get_config() -> Experiment:
    model = VisionConfig(
        num_layers=4,
        width=64,
        num_heads=2,
        head_width=32,
        mlp_width=128,
        num_experts=8,
        moe_every=2,
        image_size=28,
        patch_size=4,
        channels=1,
        num_classes=10,
        unroll=True,  # A scanned step takes 1.3 times as long on a CPU.
    )
    model.moe = MoEConfig(
        router=VMoE(k=1),
        capacity=Capacity(1.05, 1.05, CapacityRule.VMOE_ROUND),
        group_size=8 * 50,
        experts=dataclasses.replace(model.feed_forward),
    )
    return Experiment(
        steps=500,
        model=model,
        task=ImageClassification(),
        data=ImageData(dataset="fashion_mnist", batch_size=64),
        optimizer=AdamW(learning_rate=3e-3, warmup_steps=50),
        logging=Logging(every=20),
        checkpoint=Checkpointing(every=250, keep=1),
        evaluation=Evaluation(every=250, batches=64),
    )
