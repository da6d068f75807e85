"""A small decoder with the router and the dataset of this project.

python -m moe_jax train --config=my_project/config.py --workdir=runs/cosine
"""

import moe_jax as moe
import my_project.arithmetic  # noqa: F401 - the dataset's name is known once its file is imported.
from my_project.cosine import Cosine


def get_config() -> moe.Experiment:
    """8 experts in both blocks, on 8 host devices as data=2 x expert=4."""
    config = moe.Experiment(steps=300)
    config.model = moe.DecoderLMConfig(
        num_layers=2,
        width=32,
        num_heads=2,
        head_width=16,
        mlp_width=64,
        num_experts=8,
        moe_every=1,
        max_length=64,
        moe=moe.MoEConfig(router=Cosine()),
    )
    config.data = moe.TextData(dataset="arithmetic", sequence_length=64, batch_size=16)
    config.optimizer = moe.AdamW(learning_rate=5e-3, warmup_steps=30)
    config.mesh = moe.MeshConfig(data=2, expert=4)
    config.logging.every = 10
    config.evaluation.batches = 2
    return config
