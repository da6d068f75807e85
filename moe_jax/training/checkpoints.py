"""Checkpoints that are either whole or not used: Orbax payloads under a sha256 manifest.

A checkpoint is the folder `<directory>/<step>/`. Orbax writes the arrays under a temporary name and
renames the folder; then `manifest.json`, with the size and sha256 of every file, is written last. So
a folder without a manifest is an interrupted save, and a folder that disagrees with its manifest is
damaged. Orbax alone restores a flipped byte of an array without a word.

With several processes, which must share the directory, every process calls every method. Each
verifies for itself, so all raise the same error and none waits for another; process 0 alone writes
manifests and deletes.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from logging import LogRecord
from typing import Any, NamedTuple

import jax
from absl import logging
from etils import epath, epy

from moe_jax.errors import UserError
from moe_jax.parallel import multihost
from moe_jax.training.stages import CheckpointStage
from moe_jax.training.storage import absolute, is_remote

with epy.lazy_imports():  # Orbax takes longer to import than JAX.
    import orbax.checkpoint as ocp

    from moe_jax.training import staged_save

PyTree = Any

_MANIFEST = "manifest.json"
_STEP_FOLDER = re.compile(r"(\d+)(\.orbax-checkpoint-tmp.*)?")
_OS_ERROR_CODE = re.compile(r"os_error_code='(\d+)'")
_HASH_CHUNK_BYTES = 1 << 20
_CLEAN_UP_ATTEMPTS = 20
_CLEAN_UP_PAUSE_SECONDS = 0.1


class Checkpoints:
    """The checkpoints of one run: saves, verifies, restores and retires them.

    Args:
      directory: the folder that holds one folder per step; made by the first save.
      keep: how many checkpoints to keep, the newest included; at least 1.
      on_stage: called on process 0 with (stage, step) as a save passes each stage. An OSError that
        it raises counts as a failure to write.

    Raises:
      UserError: `keep` is below 1.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        keep: int = 3,
        on_stage: Callable[[CheckpointStage, int], None] | None = None,
    ) -> None:
        if keep < 1:
            raise UserError(
                f"keep is {keep}, but at least 1 checkpoint must be kept for a run to resume from."
            )
        self._directory = absolute(directory)
        self._keep = keep
        self._on_stage = on_stage or (lambda stage, step: None)
        logging.get_absl_logger().addFilter(_is_not_from_orbax)

    def steps(self) -> list[int]:
        """Steps whose save was finished, ascending; they may be damaged (see `newest_good`)."""
        return sorted(step for path, step in self._folders() if (path / _MANIFEST).exists())

    def save(self, step: int, state: PyTree) -> None:
        """Writes a checkpoint and returns when it is whole; then retires the oldest beyond `keep`.

        Does nothing if an undamaged checkpoint of that step exists.

        Args:
          step: the number of finished training steps.
          state: pytree of `jax.Array`, sharded in any way.

        Raises:
          UserError: the files could not be written. What was written of them is removed, and the
            older checkpoints are as before.
        """
        if step in self.steps() and _damage(self._folder(step)) is None:
            return
        try:
            # The others write only into a directory that is there.
            multihost.by_first_process(lambda: self._make_ready(step, state))
            self._write_payload(step, state)
            if jax.process_index() == 0:
                self._on_stage(CheckpointStage.COMMITTED, step)
                _write_manifest(self._folder(step))
        except (OSError, ValueError) as error:  # TensorStore reports a full disk as a ValueError.
            if isinstance(error, ValueError) and not _OS_ERROR_CODE.search(str(error)):
                raise
            if jax.process_index() == 0:
                self._clean_up_after_failure(step)
            good, _ = self._survey()
            raise UserError(
                f"checkpoint step {step} could not be written to {self._directory}:"
                f" {_reason(error)}; make room or allow writing there and start again"
                f" (last good checkpoint: {_step_or_none(good)})."
            ) from error
        if jax.process_index() == 0:
            self._on_stage(CheckpointStage.DONE, step)
            self._retire(step)
        multihost.wait_for_all()

    def newest_good(self) -> int | None:
        """Newest step of which every file agrees with the manifest; None if there is none to use.

        Each newer one that is damaged or unfinished is logged as a warning, in one sentence.

        Raises:
          UserError: there are finished checkpoints, and all are damaged.
        """
        good, damages = self._survey()
        if good is None and damages:
            details = ", ".join(f"step {step}: {damage}" for step, damage in damages.items())
            raise UserError(
                f"directory {self._directory} holds no undamaged checkpoint ({details}); bring back"
                " a copy of one, or delete the directory to start from the beginning."
            )
        unfinished = {
            step: f"its save was interrupted and left no {_MANIFEST}"
            for step in self._unfinished_steps()
            if good is None or step > good
        }
        for step, problem in sorted((damages | unfinished).items(), reverse=True):
            logging.warning(
                "Checkpoint step %d in %s is not used: %s; used instead: %s.",
                *(step, self._directory, problem, _step_or_none(good)),
            )
        return good

    def restore(self, step: int, abstract_state: PyTree) -> PyTree:
        """Verifies a checkpoint and reads it onto the devices that `abstract_state` names.

        Args:
          step: one of `steps()`.
          abstract_state: the saved pytree with a `jax.ShapeDtypeStruct` that has a sharding for
            each array. The mesh need not be the one that saved it.

        Returns:
          The arrays, bit for bit, in the structure of `abstract_state`.

        Raises:
          UserError: no such checkpoint, a damaged one, or one whose leaves, shapes or dtypes differ.
        """
        name = f"checkpoint step {step} in {self._directory}"
        if step not in self.steps():
            raise UserError(f"{name} does not exist; the steps there are {self.steps()}.")
        if damage := _damage(self._folder(step)):
            raise UserError(f"{name} is damaged, so use another of {self.steps()}: {damage}.")
        wanted = _named_leaves(abstract_state)
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            metadata = checkpointer.metadata(self._folder(step)).item_metadata
            _check_same_leaves(name, metadata.tree, wanted)
            found = checkpointer.restore(self._folder(step), args=ocp.args.StandardRestore(wanted))
        leaves = [found[leaf] for leaf in wanted]
        return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves)

    def _folder(self, step: int) -> epath.Path:
        return self._directory / str(step)

    def _folders(self) -> list[tuple[epath.Path, int]]:
        """Folders of all saves, finished or not, with their steps."""
        if not self._directory.exists():
            return []
        matches = ((path, _STEP_FOLDER.fullmatch(path.name)) for path in self._directory.iterdir())
        return [(path, int(match.group(1))) for path, match in matches if match]

    def _unfinished_steps(self) -> set[int]:
        return {step for _, step in self._folders()} - set(self.steps())

    def _survey(self) -> tuple[int | None, dict[int, str]]:
        """The newest undamaged step, and what is wrong with each finished one newer than it."""
        damages: dict[int, str] = {}
        for step in reversed(self.steps()):
            damage = _damage(self._folder(step))
            if damage is None:
                return step, damages
            damages[step] = damage
        return None, damages

    def _write_payload(self, step: int, state: PyTree) -> None:
        handler = staged_save.StagedHandler(lambda stage: self._on_stage(stage, step))
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(self._folder(step), args=staged_save.StagedSave(_named_leaves(state)))

    def _make_ready(self, step: int, state: PyTree) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        self._remove_debris(step)
        _check_free_space(self._directory, state)

    def _remove_debris(self, step: int) -> None:
        """Removes what interrupted saves left, and a damaged checkpoint of `step`."""
        for path, other_step in self._folders():
            if not (path / _MANIFEST).exists() or (
                other_step == step and _damage(path) is not None
            ):
                _remove_folder(path)

    def _clean_up_after_failure(self, step: int) -> None:
        # Orbax raises at the first array that fails, while TensorStore's threads still write others
        # and so recreate what is removed: remove until it stays removed.
        for _ in range(_CLEAN_UP_ATTEMPTS):
            with contextlib.suppress(OSError):
                self._remove_debris(step)
            time.sleep(_CLEAN_UP_PAUSE_SECONDS)
            if not self._unfinished_steps():
                return

    def _retire(self, step: int) -> None:
        # Counted downwards from the one just written: a newer folder is a damaged one that this run
        # has yet to overwrite, and must not push a good one out.
        finished = [other for other in self.steps() if other <= step]
        for old in finished[: -self._keep]:
            _remove_folder(self._folder(old))


class _Digest(NamedTuple):
    sha256: str
    size: int  # bytes


def _damage(folder: epath.Path) -> str | None:
    """The first way in which a checkpoint disagrees with its manifest, or None."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        expected = {name: _Digest(**entry) for name, entry in manifest.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return f"{_MANIFEST} is not readable"
    present = set(_payload_files(folder))
    for name in sorted(present | expected.keys()):
        if name not in present:
            return f"file {name} is missing"
        if name not in expected:
            return f"file {name} does not belong to it"
        try:
            found = _digest(folder / name)
        except OSError as error:
            return f"file {name} cannot be read ({_reason(error)})"
        if found.size != expected[name].size:
            kind = "truncated" if found.size < expected[name].size else "too long"
            return f"file {name} is {kind} ({found.size} bytes of {expected[name].size})"
        if found.sha256 != expected[name].sha256:
            return f"file {name} has flipped bits (its sha256 differs)"
    return None


def _write_manifest(folder: epath.Path) -> None:
    manifest = {name: _digest(folder / name)._asdict() for name in sorted(_payload_files(folder))}
    temporary = folder / f"{_MANIFEST}.tmp"
    temporary.write_text(json.dumps(manifest, indent=1))
    temporary.replace(folder / _MANIFEST)


def _payload_files(folder: epath.Path, prefix: str = "") -> Iterator[str]:
    """Paths of all files but the manifest, relative to the checkpoint's folder."""
    # Not `folder.walk()`, which gives gs://bucket/x as bucket/x.
    for path in folder.iterdir():
        name = prefix + path.name
        if path.is_dir():
            yield from _payload_files(path, f"{name}/")
        elif name != _MANIFEST:
            yield name


def _digest(path: epath.Path) -> _Digest:
    sha256, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK_BYTES):
            sha256.update(chunk)
            size += len(chunk)
    return _Digest(sha256.hexdigest(), size)


def _remove_folder(folder: epath.Path) -> None:
    # The manifest first: a folder whose removal is interrupted then counts as unfinished.
    (folder / _MANIFEST).unlink(missing_ok=True)
    folder.rmtree()


def _named_leaves(tree: PyTree) -> dict[str, Any]:
    """Leaves by their path ("params/layer_0/kernel"), in the order of `jax.tree.leaves`."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def _check_same_leaves(name: str, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Orbax would cast another dtype silently and answers another structure with a page of text."""
    advice = "use the configuration of the run that wrote it"
    for leaf in sorted(saved.keys() ^ wanted.keys()):
        where = "in this run's state" if leaf in wanted else f"in {name}"
        other = name if leaf in wanted else "this run's state"
        raise UserError(f"leaf {leaf} is {where} but not in {other}; {advice}.")
    for leaf, array in wanted.items():
        found, needed = _describe(saved[leaf]), _describe(array)
        if found != needed:
            raise UserError(
                f"leaf {leaf} is {found} in {name}, but {needed} in this run's state; {advice}."
            )


def _describe(array: Any) -> str:
    return f"{array.dtype}[{','.join(map(str, array.shape))}]"


def _check_free_space(directory: epath.Path, state: PyTree) -> None:
    """Refuses to start what cannot fit: TensorStore's own way to say so is 50 tracebacks on stderr.

    Compression is left out of the estimate: random float32 values shrink by 8 %.
    """
    if is_remote(directory):
        return
    free = shutil.disk_usage(directory).free
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    if free < needed:
        message = f"no space left, {free / 1e6:.1f} MB are free and {needed / 1e6:.1f} MB needed"
        raise OSError(errno.ENOSPC, message)


def _reason(error: Exception) -> str:
    """The operating system's few words for a failure, also from inside TensorStore's message."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    code = _OS_ERROR_CODE.search(str(error))
    return os.strerror(int(code.group(1))) if code else str(error)


def _step_or_none(step: int | None) -> str:
    return "none" if step is None else f"step {step}"


def _is_not_from_orbax(record: LogRecord) -> bool:
    # Some 40 lines per save, and a page of tracebacks per failure, which reaches us as an exception.
    return f"{os.sep}orbax{os.sep}" not in record.pathname
