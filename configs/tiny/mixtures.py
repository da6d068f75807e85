"""The four vowel experts of Jacobs et al. (1991) on 8 host devices as data=2 x expert=4.

Adam in place of their gradient descent takes 200 epochs to where that takes 1,000: half a minute on
two CPU cores. Prepare the vowels first:

    python experiments/prepare_data.py --dataset=peterson_barney
"""

from configs.jacobs_1991 import mixture_of
from moe_jax.parallel.mesh import MeshConfig
from moe_jax.training.experiment import Experiment
from moe_jax.training.optimizers import AdamW


def get_config() -> Experiment:
    config = mixture_of(4)
    config.steps = 200
    config.optimizer = AdamW(learning_rate=0.1, warmup_steps=10, weight_decay=0.0)
    config.mesh = MeshConfig(data=2, expert=4)
    config.evaluation.every = 50
    return config
