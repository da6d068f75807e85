"""The Vision Transformer of the claims about images, sized for one GPU: minutes a run.

Eight blocks of width 384 on 49 patches of 4 x 4 pixels and a class token, every second with 8 experts
of which a patch takes one, so that `--config.model.moe_every=0` is the dense twin of equal FLOPs;
bfloat16. Groups are 8 images, as V-MoE's. Prepare the images first:

    python experiments/prepare_data.py --dataset=fashion_mnist
"""

import dataclasses

from moe_jax.data.images import ImageData
from moe_jax.layers.moe import MoEConfig
from moe_jax.models.stack import ComputeDtype
from moe_jax.models.vision import VisionConfig
from moe_jax.routing.capacity import Capacity, CapacityRule
from moe_jax.routing.token_choice import VMoE
from moe_jax.tasks.image_classification import ImageClassification
from moe_jax.training.experiment import Checkpointing, Evaluation, Experiment, Logging
from moe_jax.training.optimizers import AdamW


def get_config() -> Experiment:
    model = VisionConfig(
        num_layers=8,
        width=384,
        num_heads=6,
        head_width=64,
        mlp_width=1536,
        num_experts=8,
        moe_every=2,
        image_size=28,
        patch_size=4,
        channels=1,
        num_classes=10,
        dtype=ComputeDtype.BFLOAT16,
    )
    model.moe = MoEConfig(
        router=VMoE(k=1),
        capacity=Capacity(1.05, 1.05, CapacityRule.VMOE_ROUND),
        group_size=8 * 50,
        experts=dataclasses.replace(model.feed_forward),
    )
    return Experiment(
        steps=5000,
        model=model,
        task=ImageClassification(),
        data=ImageData(dataset="fashion_mnist", shift=2, batch_size=256),
        optimizer=AdamW(learning_rate=1e-3, warmup_steps=500),
        logging=Logging(every=50),
        checkpoint=Checkpointing(every=1000, keep=1),
        evaluation=Evaluation(every=1000, batches=39),
    )
