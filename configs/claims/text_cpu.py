"""The decoder of the claims about language models, sized for a core of a CPU: minutes a run.

Two blocks of width 64 on the 14 domains of debian_text, byte by byte; the second block has 8 experts,
of which Switch's router takes one, without a capacity limit.

Chosen by runs of 600 steps, because what differs from Switch is what so short a training needs (loss on
the validation split; the dense twin has 2.169): experts in the second block alone 2.092, in both 2.155;
with the capacity factor 1.25 in place of none 2.155. Router weights begin with the deviation 1/sqrt(64),
so that logits differ by 1 as they do in wide models, and gates are multiplied by sqrt(2 E), so that
an expert's output begins about as large as a dense layer's and is not blown up when the router becomes
sure: 2.056 with 8 experts and 2.071 with 32; with gates times E and a deviation of 0.02, 2.092 and 2.144.
A balancing loss of 0.01 instead of 0.001 gives 2.094 with 32.
"""

from moe_jax.data.pipelines import TextData
from moe_jax.dispatch.dropless import Dropless
from moe_jax.layers.moe import MoEConfig
from moe_jax.models.decoder_lm import DecoderLMConfig
from moe_jax.routing.losses import Losses
from moe_jax.routing.token_choice import TopK
from moe_jax.training.experiment import Checkpointing, Evaluation, Experiment, Logging
from moe_jax.training.optimizers import AdamW


def get_config() -> Experiment:
    return Experiment(
        steps=500,
        model=DecoderLMConfig(
            num_layers=2,
            width=64,
            num_heads=1,
            head_width=64,
            mlp_width=128,
            num_experts=8,
            moe_every=2,
            max_length=128,
            unroll=True,  # A scanned step takes 1.3 times as long on a CPU.
            moe=MoEConfig(
                router=TopK(losses=Losses(load_balancing=1e-3), gate_scale=4, init_deviation=0.125),
                dispatch=Dropless(),
                group_size=2048,
            ),
        ),
        data=TextData(dataset="debian_text", sequence_length=128, batch_size=16),
        optimizer=AdamW(learning_rate=8e-3, warmup_steps=100),
        logging=Logging(every=20),
        checkpoint=Checkpointing(every=300, keep=1),
        evaluation=Evaluation(every=100, batches=32),
    )
