"""Runs the tiny config in a process of its own, which kills itself where it is told to.

Usage: run_and_die.py DATA_DIR WORKDIR [STAGE STEP]
"""

import os
import signal
import sys

from absl import flags

from moe_jax import command_line
from moe_jax.training import loop
from moe_jax.training.checkpoints import CheckpointStage
from tests.tiny import tiny_config


def main() -> None:
    data_dir, workdir, *where = sys.argv[1:]

    def on_stage(stage: CheckpointStage, step: int) -> None:
        if where == [stage.value, str(step)]:
            os.kill(os.getpid(), signal.SIGKILL)

    loop.train(tiny_config(data_dir), workdir, on_stage)


if __name__ == "__main__":
    flags.FLAGS(sys.argv[:1])
    command_line.report_to_user(main)
