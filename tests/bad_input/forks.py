"""Runs a script many times in processes that share their imports."""

import contextlib
import dataclasses
import multiprocessing
import os
import pathlib
import runpy
import sys
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).parents[2]

# What takes long to import, and nothing that defines a script's flags.
_PRELOADED = [
    "array_record.python.array_record_module", "grain", "jax", "matplotlib.figure", "orbax.checkpoint",
    "tensorflow_datasets", "tokenizers", "moe_jax.analysis.figures", "moe_jax.command_line",
    "moe_jax.training.loop",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Done:
    """What came of a script: its exit status, stdout and stderr; status None for one that hung."""

    status: int | None
    out: str
    err: str


class Forks:
    """Starts scripts in copies of one process that has the imports, which has not used JAX yet."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(_PRELOADED)
        self._folder = folder

    def run(self, script: str, arguments: Sequence[str], limit: float = 60.0) -> Done:
        """Runs `script`, a path in the project, as `python script arguments`, for `limit` seconds."""
        files = [self._folder / name for name in ("out", "err")]
        process = self._context.Process(target=_run, args=(script, list(arguments), *files))
        process.start()
        process.join(limit)
        if process.exitcode is None:
            process.kill()
            process.join()
            return Done(None, *(file.read_text() for file in files))
        return Done(process.exitcode, *(file.read_text() for file in files))


def _run(script: str, arguments: list[str], out: pathlib.Path, err: pathlib.Path) -> None:
    for stream, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.chdir(ROOT)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str((ROOT / script).parent))
    with contextlib.suppress(BrokenPipeError):
        runpy.run_path(script, run_name="__main__")
