"""A Switch-style decoder on the 14 domains of debian_text, sized for two CPU cores.

8 experts in every block, top-1, capacity factor 1.25, load-balancing loss 1e-2. Unlike Switch's, the
gates are multiplied by 8 (DeepSeek-V2's routed scaling factor), so that an expert's output starts as
large as the dense twin's. Run by experiments/moe_vs_dense.py, which derives the dense twin and sweeps
the learning rate of both.
"""

from moe_jax.data.pipelines import TextData
from moe_jax.layers.moe import MoEConfig
from moe_jax.models.decoder_lm import DecoderLMConfig
from moe_jax.routing.token_choice import TopK
from moe_jax.training.experiment import Checkpointing, Evaluation, Experiment, Logging
from moe_jax.training.optimizers import AdamW


def get_config() -> Experiment:
    return Experiment(
        steps=3000,
        model=DecoderLMConfig(
            num_layers=2,
            width=64,
            num_heads=1,
            head_width=64,
            mlp_width=128,
            num_experts=8,
            moe_every=1,
            max_length=128,
            unroll=True,  # A scanned step takes 1.3 times as long on a CPU.
            moe=MoEConfig(router=TopK(gate_scale=8), group_size=2048),
        ),
        data=TextData(dataset="debian_text", sequence_length=128, batch_size=16),
        optimizer=AdamW(learning_rate=4e-3, warmup_steps=100),
        logging=Logging(every=50),
        checkpoint=Checkpointing(every=500),
        evaluation=Evaluation(every=500, batches=128),
    )
