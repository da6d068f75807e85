"""The smallest run that has everything: used by the trainer's tests, also in subprocesses."""

from moe_jax.data.pipelines import TextData
from moe_jax.layers.moe import MoEConfig
from moe_jax.models.decoder_lm import DecoderLMConfig
from moe_jax.parallel.mesh import MeshConfig
from moe_jax.routing.scores import Exploration
from moe_jax.routing.token_choice import TopK
from moe_jax.training.experiment import Checkpointing, Evaluation, Experiment, Logging
from moe_jax.training.optimizers import AdamW, Schedule


def tiny_config(data_dir: str) -> Experiment:
    """Two blocks, four experts, jitter, dropout and expert dropout on, on data=2 x expert=4."""
    return Experiment(
        steps=8,
        model=DecoderLMConfig(
            num_layers=2,
            width=16,
            num_heads=2,
            head_width=8,
            mlp_width=32,
            num_experts=4,
            max_length=32,
            dropout=0.1,
            moe=MoEConfig(
                router=TopK(exploration=Exploration.JITTER, exploration_rate=0.01),
                group_size=64,
                expert_dropout=0.1,
            ),
        ),
        data=TextData(data_dir=data_dir, sequence_length=32, batch_size=16),
        # COSINE would put `steps` into the compiled step, so that runs of 4 and of 8 share none.
        optimizer=AdamW(learning_rate=1e-2, warmup_steps=2, schedule=Schedule.INVERSE_SQRT),
        mesh=MeshConfig(data=2, expert=4, fsdp_min_size=64),
        logging=Logging(every=2),
        checkpoint=Checkpointing(every=4),
        evaluation=Evaluation(every=4, batches=2),
    )
