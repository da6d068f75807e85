"""What the process of one run does: it trains, by the function that train.py calls, and measures."""

import contextlib
import fcntl
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence

from moe_jax import command_line
from moe_jax.reproduction.claim import Measurement
from moe_jax.reproduction.runs import RunFolder
from moe_jax.training import loop
from moe_jax.training.trained import Trained

STOPPED_STATUS = 3
"""Exit status of a process that was asked to stop, and has saved the state of its run."""


def work(folder: RunFolder, measurements: Sequence[Measurement], cores: Sequence[int]) -> None:
    """Trains to the end and makes the measurements that are missing; for a process of its own.

    Ends the process with status 0, `STOPPED_STATUS`, or 1 after the traceback in the run's log.

    Args:
      folder: the run; it is continued if it has begun.
      measurements: to be made.
      cores: of the CPU, on which the process stays; empty for any.
    """
    folder.path.mkdir(parents=True, exist_ok=True)
    _print_to(folder)
    if cores:
        os.sched_setaffinity(0, cores)
    if len(cores) == 1:
        # Code in parts, for several threads to compile, takes one thread 9 s in place of 7.
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_parallel_codegen_split_count=1"
    command_line.keep_compiled_programs()
    _end_with_parent()
    try:
        with _alone(folder):
            _train_and_measure(folder, measurements)
    except loop.Interrupted as stopped:
        print(stopped)
        sys.exit(STOPPED_STATUS)
    except Exception:
        traceback.print_exc()
        sys.exit(1)


def _train_and_measure(folder: RunFolder, measurements: Sequence[Measurement]) -> None:
    if not folder.trained:
        try:
            loop.train(folder.config, folder.path)
        except loop.DivergedError as diverged:
            print(diverged)
            folder.diverged(diverged.step)
    missing = folder.missing(measurements)
    if missing:
        trained = Trained.load(folder.path)
        for measurement in missing:
            folder.measured(measurement, measurement.measure(trained))


def _print_to(folder: RunFolder) -> None:
    """Sends all that the process prints to the run's log, libraries' lines too."""
    sys.stdout.flush()
    with folder.log.open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)


def _end_with_parent() -> None:
    """Asks this process to save and stop when the suite's process dies, so that none is left over."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def _alone(folder: RunFolder) -> Iterator[None]:
    """Waits until no other process works on the run, such as one of a suite that was killed."""
    with (folder.path / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
