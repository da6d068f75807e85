"""Some steps of a run under JAX's profiler, to be opened with TensorBoard or xprof.

Every process traces its own devices, into profile/process_<index> of the run's folder.
"""

import logging
import os
import re
import tempfile
from typing import Any

import jax
from etils import epath

from moe_jax.errors import UserError
from moe_jax.training.storage import is_remote

FOLDER = "profile"

_LOG = logging.getLogger(__name__)


def parse(text: str) -> range:
    """Reads FIRST:COUNT, such as 10:5 for the steps 10 to 14; empty for no step.

    Raises:
      UserError: not of this form, or a number is 0.
    """
    if not text:
        return range(0)
    found = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", text, re.ASCII)
    if not found:
        raise UserError(
            f"--profile_steps is {text!r}; write it as FIRST:COUNT, both at least 1, such as 10:5 for "
            "the steps 10 to 14."
        )
    first, count = map(int, found.groups())
    return range(first, first + count)


class StepTracer:
    """Starts the profiler before the first of the steps and stops it after the last.

    A run that continues in the middle of the steps traces the rest of them, and one that ends there
    those that it did.

    Args:
      steps: to trace; numbered from 1, as in the records.
      workdir: the run's folder, here or remote.
    """

    def __init__(self, steps: range, workdir: epath.Path) -> None:
        self._steps = steps
        self._target = workdir / FOLDER / f"process_{jax.process_index()}"
        self._traced: epath.Path | None = None  # Where the profiler writes, while it runs.

    def before(self, step: int, state: Any) -> None:
        """Just before a step is called.

        Args:
          step: its number.
          state: arrays that are ready when the step before it is computed, which is not traced.
        """
        if self._traced is not None or step not in self._steps:
            return
        jax.block_until_ready(state)
        # The profiler itself writes to local folders only.
        local = tempfile.mkdtemp() if is_remote(self._target) else self._target
        self._traced = epath.Path(local)
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # It would slow down what it measures.
        jax.profiler.start_trace(os.fspath(self._traced), profiler_options=options)

    def after(self, step: int, results: Any) -> bool:
        """Just after a step was called.

        Args:
          step: its number.
          results: arrays that are ready when it is computed.

        Returns:
          Whether that was the last step traced, which is then computed.
        """
        if self._traced is None or step + 1 in self._steps:
            return False
        jax.block_until_ready(results)
        self.close()
        return True

    def close(self) -> None:
        """Stops the profiler if it runs, and says where the trace is."""
        if self._traced is None:
            return
        jax.profiler.stop_trace()
        if self._traced != self._target:
            _move(self._traced, self._target)
        self._traced = None
        _LOG.info(
            "The trace of this process's devices is in %s; open all with `xprof --logdir=%s`.",
            *(self._target, self._target.parent),
        )


def _move(source: epath.Path, target: epath.Path) -> None:
    for parent, _, names in source.walk():
        folder = target / parent.relative_to(source)
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            (parent / name).copy(folder / name)
    source.rmtree()
