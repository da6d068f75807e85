"""Orbax's save of a pytree of arrays, with a word at each of its stages."""

from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from moe_jax.training.stages import UNFINISHED, CheckpointStage


class StagedHandler(ocp.StandardCheckpointHandler):
    """Orbax's handler of pytrees of arrays, which also reports the stages inside a save."""

    def __init__(self, on_stage: Callable[[CheckpointStage], None]) -> None:
        super().__init__()
        self._on_stage = on_stage

    def save(self, directory: epath.Path, *args: Any, **kwargs: Any) -> None:
        """Writes the arrays of this process into the temporary `directory`."""
        if jax.process_index() == 0:
            (directory / UNFINISHED).write_text("{}")
            self._on_stage(CheckpointStage.WRITING)
        super().save(directory, *args, **kwargs)

    def finalize(self, directory: epath.Path) -> None:
        """Merges what the processes wrote; Orbax calls it on process 0 and renames afterwards."""
        super().finalize(directory)
        self._on_stage(CheckpointStage.WRITTEN)


@ocp.args.register_with_handler(StagedHandler, for_save=True)
class StagedSave(ocp.args.StandardSave):
    """What `StagedHandler` saves; Orbax wants a class of arguments for each handler."""


@ocp.args.register_with_handler(StagedHandler, for_restore=True)
class StagedRestore(ocp.args.StandardRestore):
    """What `StagedHandler` restores; Orbax wants the pair."""
