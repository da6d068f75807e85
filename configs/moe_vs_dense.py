"""A Switch-style decoder on the 14 domains of debian_text, sized for two CPU cores.

16 experts, top-1, capacity factor 1.25, load-balancing loss 1e-2, every second block. Run by
experiments/moe_vs_dense.py, which derives the dense twin and sweeps the learning rate of both.
"""

from moe_jax.data.pipelines import TextData
from moe_jax.layers.moe import MoEConfig
from moe_jax.models.decoder_lm import DecoderLMConfig
from moe_jax.training.experiment import Checkpointing, Evaluation, Experiment, Logging
from moe_jax.training.optimizers import AdamW


def get_config() -> Experiment:
    return Experiment(
        steps=500,
        model=DecoderLMConfig(
            num_layers=4,
            width=128,
            num_heads=2,
            head_width=64,
            mlp_width=512,
            num_experts=16,
            moe_every=2,
            max_length=128,
            moe=MoEConfig(group_size=1024),
        ),
        data=TextData(dataset="debian_text", sequence_length=128, batch_size=64),
        optimizer=AdamW(learning_rate=2e-3, warmup_steps=50),
        logging=Logging(every=10),
        checkpoint=Checkpointing(every=100),
        evaluation=Evaluation(every=100, batches=32),
    )
