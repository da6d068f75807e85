"""How far the save of a checkpoint has come."""

import enum

UNFINISHED = "unfinished.json"
"""Lies in the folder of a save from its first file until its manifest is written."""


class CheckpointStage(enum.StrEnum):
    """How far a save has come; an interruption is harmless at each of them."""

    WRITING = "writing"  # The temporary folder exists, the arrays are not in it yet.
    WRITTEN = "written"  # The arrays are complete, under the temporary name.
    COMMITTED = "committed"  # The folder has its final name, but no manifest.
    DONE = "done"  # The manifest is written: the checkpoint counts from here on.
