"""The decoder of the claims about language models, sized for a core of a CPU: minutes a run.

Two blocks of width 64, each with a Switch layer of 8 experts, on the 14 domains of
debian_text, byte by byte. Gates are multiplied by E, unlike Switch's, so that an expert's output starts
as large as a dense layer's.
"""

from moe_jax.data.pipelines import TextData
from moe_jax.layers.moe import MoEConfig
from moe_jax.models.decoder_lm import DecoderLMConfig
from moe_jax.routing.token_choice import TopK
from moe_jax.training.experiment import Checkpointing, Evaluation, Experiment, Logging
from moe_jax.training.optimizers import AdamW


def get_config() -> Experiment:
    return Experiment(
        steps=600,
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
        optimizer=AdamW(learning_rate=8e-3, warmup_steps=100),
        logging=Logging(every=20),
        checkpoint=Checkpointing(every=300, keep=1),
        evaluation=Evaluation(every=100, batches=32),
    )
