"""A small Switch-style decoder on Python's own library and documentation.

8 experts, top-1 routing, capacity factor 1.25, load-balancing loss 1e-2 (Fedus et al. 2021), four on
each of two host devices: a step on 8 takes 1.4 times as long on two cores. Unlike Switch's, the gates
are multiplied by 8 (DeepSeek-V2's routed scaling factor), so that an expert's output starts as large as
the dense twin's: a top-1 gate starts near 1/8.
"""

from moe_jax.data.pipelines import TextData
from moe_jax.layers.moe import MoEConfig
from moe_jax.models.decoder_lm import DecoderLMConfig
from moe_jax.parallel.mesh import MeshConfig
from moe_jax.routing.capacity import Capacity
from moe_jax.routing.losses import Losses
from moe_jax.routing.token_choice import TopK
from moe_jax.training.experiment import Checkpointing, Evaluation, Experiment, Logging
from moe_jax.training.optimizers import AdamW


def get_config() -> Experiment:
    return Experiment(
        steps=1200,
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
            moe=MoEConfig(
                router=TopK(k=1, gate_scale=8, losses=Losses(load_balancing=1e-2)),
                capacity=Capacity(train_factor=1.25, evaluation_factor=2.0),
                group_size=256,
            ),
        ),
        data=TextData(dataset="python_library", sequence_length=128, batch_size=16),
        optimizer=AdamW(learning_rate=4e-3, warmup_steps=100),
        mesh=MeshConfig(expert=2),
        logging=Logging(every=10),
        checkpoint=Checkpointing(every=20),
        evaluation=Evaluation(every=100, batches=32),
    )
