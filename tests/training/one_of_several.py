"""experiments/train.py in a process that sends itself a signal where it is told to; and its config.

Usage: one_of_several.py SIGNAL STEP [flags of train.py]; STEP 0 for no signal.
"""

import os
import signal
import sys

from experiments import train
from moe_jax import command_line
from moe_jax.data.pipelines import TextPipeline
from moe_jax.parallel import multihost
from moe_jax.parallel.mesh import MeshConfig
from moe_jax.routing.token_choice import TopK
from moe_jax.training.experiment import Evaluation, Experiment
from tests.tiny import tiny_config


def get_config() -> Experiment:
    """One MoE block with an expert on each of eight devices, and little to compile.

    Nothing is cached for any process but the first, so each start of one compiles anew.
    """
    config = tiny_config("")
    config.steps = 9
    config.model.num_layers = config.model.moe_every = 1
    config.model.num_experts, config.model.dropout = 8, 0.0
    config.model.moe.router, config.model.moe.expert_dropout = TopK(), 0.0
    config.mesh = MeshConfig(expert=8)
    config.logging.every, config.checkpoint.every, config.checkpoint.keep = 1, 3, 9
    config.evaluation = Evaluation(every=0, batches=1)
    return config


def main() -> None:
    """Trains; the signal comes while the data of its step are read."""
    waiting, at_step = [signal.Signals[sys.argv.pop(1)]], int(sys.argv.pop(1))
    rows = TextPipeline.rows

    def rows_after_signal(self, index, first, last):
        if index + 1 == at_step and waiting:
            os.kill(os.getpid(), waiting.pop())
        return rows(self, index, first, last)

    TextPipeline.rows = rows_after_signal
    multihost.PATIENCE_SECONDS = 15
    command_line.run(train.main)


if __name__ == "__main__":
    main()
