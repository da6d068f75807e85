"""experiments/train.py in a process that sends itself a signal where it is told to.

Usage: one_of_several.py SIGNAL STEP [flags of train.py]; STEP 0 for no signal.
"""

import os
import signal
import sys

from moe_jax import command_line
from moe_jax.commands import train
from moe_jax.data.pipelines import TextPipeline
from moe_jax.parallel import multihost


def main() -> None:
    """Trains; the signal comes while the data of its step are read."""
    waiting, at_step = [signal.Signals[sys.argv.pop(1)]], int(sys.argv.pop(1))
    rows = TextPipeline.rows

    def rows_after_signal(self, index, first, last):
        if index + 1 == at_step and waiting:
            os.kill(os.getpid(), waiting.pop())
        return rows(self, index, first, last)

    TextPipeline.rows = rows_after_signal
    multihost.PATIENCE_SECONDS = int(os.environ.get("PATIENCE_SECONDS", "15"))
    command_line.run(train.main)


if __name__ == "__main__":
    main()
