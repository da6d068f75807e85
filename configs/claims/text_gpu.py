"""The decoder of the claims about language models, sized for one GPU: ten minutes a run.

Eight blocks of width 512, every second with a Switch layer of 8 experts, on the 14 domains of
debian_text, byte by byte, in bfloat16. Gates are multiplied by E, unlike Switch's, so that an expert's output starts
as large as a dense layer's.
"""

from moe_jax.data.pipelines import TextData
from moe_jax.dispatch.dropless import Dropless
from moe_jax.layers.moe import MoEConfig
from moe_jax.models.decoder_lm import DecoderLMConfig
from moe_jax.models.stack import ComputeDtype
from moe_jax.routing.losses import Losses
from moe_jax.routing.token_choice import TopK
from moe_jax.training.experiment import Checkpointing, Evaluation, Experiment, Logging
from moe_jax.training.optimizers import AdamW


def get_config() -> Experiment:
    return Experiment(
        steps=4000,
        model=DecoderLMConfig(
            num_layers=8,
            width=512,
            num_heads=8,
            head_width=64,
            mlp_width=2048,
            num_experts=8,
            moe_every=2,
            max_length=512,
            dtype=ComputeDtype.BFLOAT16,
            moe=MoEConfig(
                router=TopK(losses=Losses(load_balancing=1e-3), gate_scale=4, init_deviation=0.044),
                dispatch=Dropless(),
                group_size=4096,
            ),
        ),
        data=TextData(dataset="debian_text", sequence_length=512, batch_size=128),
        optimizer=AdamW(learning_rate=1e-3, warmup_steps=400),
        logging=Logging(every=20),
        checkpoint=Checkpointing(every=1000, keep=1),
        evaluation=Evaluation(every=500, batches=16),
    )
