"""Checkpoints that are either whole or not used: Orbax payloads under a sha256 manifest.

A checkpoint is the folder `<directory>/<step>/`. Orbax writes the arrays under a temporary name and
renames the folder; then `manifest.json`, with the step and the size and sha256 of every file, is written
last. A folder in which `unfinished.json` lies beside no manifest is an interrupted save; one that
disagrees with its manifest, or has another name than its step, is damaged; one that lacks both is none of
ours, or has lost its manifest. Orbax alone restores a flipped byte of an array without a word.

Other people's files may lie in the directory, whatever their names. Removed are only files that a manifest
lists or that Orbax and this module name so, and folders that are empty then; what is in the way of a
checkpoint is renamed. Nothing is removed through a symbolic link.

With several processes, which must share the directory, every process calls every method. Each
verifies for itself, so all raise the same error and none waits for another; process 0 alone writes
manifests and deletes.
"""

import contextlib
import errno
import hashlib
import itertools
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
from moe_jax.training.stages import UNFINISHED, CheckpointStage
from moe_jax.training.storage import absolute, is_remote

with epy.lazy_imports():  # Orbax takes longer to import than JAX.
    import orbax.checkpoint as ocp

    from moe_jax.training import staged_save

PyTree = Any

_MANIFEST = "manifest.json"
# int() reads more digits than these, and more than one name for a number.
_STEP_FOLDER = re.compile(r"(0|[1-9][0-9]*)(\.orbax-checkpoint-tmp[^/]*)?")
# Orbax's files of a pytree of arrays, and those of a write that TensorStore has not ended.
_ORBAX_FILE = re.compile(
    r"_CHECKPOINT_METADATA|_METADATA|_sharding|commit_success\.txt|array_metadatas/process_\d+"
    r"|(ocdbt\.process_\d+/)?(manifest\.ocdbt|d/[0-9a-f]{32})(\.__lock[^/]*)?"
)
_OUR_FILES = (_MANIFEST, f"{_MANIFEST}.tmp", UNFINISHED)
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
      about: what each manifest says of the run, JSON-ready; `about` reads it.

    Raises:
      UserError: `keep` is below 1.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        keep: int = 3,
        on_stage: Callable[[CheckpointStage, int], None] | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        if keep < 1:
            raise UserError(
                f"keep is {keep}, but at least 1 checkpoint must be kept for a run to resume from."
            )
        self._directory = absolute(directory)
        self._keep = keep
        self._about = dict(about or {})
        self._on_stage = on_stage or (lambda stage, step: None)
        logging.get_absl_logger().addFilter(_is_not_from_orbax)

    def steps(self) -> list[int]:
        """Steps whose save was finished, ascending; they may be damaged (see `newest_good`)."""
        return sorted(
            int(path.name)
            for path, _ in self._folders()
            if path.name.isdigit() and (path / _MANIFEST).exists()
        )

    def about(self, step: int) -> dict[str, Any]:
        """What the manifest of a finished step says of its run; empty if it is older or damaged."""
        manifest = _read_manifest(self._folder(step))
        return {} if manifest is None else manifest.about

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
                _write_manifest(self._folder(step), self._about)
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

    def newest_good(self, to_train: bool = True) -> int | None:
        """Newest step of which every file agrees with the manifest; None if there is none to use.

        Each newer one that is damaged or unfinished is logged as a warning, in one sentence.

        Args:
          to_train: whether starting anew is advice for where there is none.

        Raises:
          UserError: there are finished checkpoints, and all are damaged or have lost their manifests.
        """
        good, damages = self._survey()
        anew = ", or delete the directory to start from the beginning" if to_train else ""
        if good is None and damages:
            details = ", ".join(f"step {step}: {damage}" for step, damage in damages.items())
            raise UserError(
                f"directory {self._directory} holds no undamaged checkpoint ({details}); bring back"
                f" a copy of one{anew}."
            )
        lost = self._without_manifest()
        if good is None and lost:
            raise UserError(
                f"directory {self._directory} holds checkpoints that have lost their {_MANIFEST} (step "
                f"{', '.join(map(str, lost))}), so that none can be trusted; bring the files "
                f"back{anew}."
            )
        problems = dict.fromkeys(lost, f"its {_MANIFEST} is gone") | dict.fromkeys(
            self._unfinished_steps(), f"its save was interrupted and left no {_MANIFEST}"
        )
        unused = {step: why for step, why in problems.items() if good is None or step > good}
        for step, problem in sorted((damages | unused).items(), reverse=True):
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
        """Folders that are named as saves are, finished or not, with their steps."""
        if not self._directory.exists():
            return []
        matches = ((path, _STEP_FOLDER.fullmatch(path.name)) for path in self._directory.iterdir())
        return [(path, int(match.group(1))) for path, match in matches if match and path.is_dir()]

    def _unfinished(self) -> list[tuple[epath.Path, int]]:
        """Folders of interrupted saves, with their steps."""
        return [
            (path, step)
            for path, step in self._folders()
            if not _is_link(path)
            and not (path / _MANIFEST).exists()
            and ((path / UNFINISHED).exists() or (not path.name.isdigit() and _is_orbax(path)))
        ]

    def _unfinished_steps(self) -> set[int]:
        return {step for _, step in self._unfinished()}

    def _without_manifest(self) -> list[int]:
        """Steps of folders in which Orbax finished a save, and nothing of ours is; ascending."""
        return sorted(
            step
            for path, step in self._folders()
            if path.name.isdigit()
            and (path / "_METADATA").exists()
            and not any((path / name).exists() for name in (_MANIFEST, UNFINISHED))
        )

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
        """Removes what interrupted saves left, and what else of ours is in the place of `step`."""
        for path, _ in self._unfinished():
            _remove_folder(path)
        place = self._folder(step)
        # The finished checkpoint that is here is damaged, or nobody would ask.
        if not _is_link(place) and (place / _MANIFEST).exists():
            _remove_folder(place)
        _move_aside(place)
        for path, other_step in self._folders():
            if other_step == step:  # Under a temporary name; Orbax would remove it.
                _move_aside(path)

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
            if not _is_link(self._folder(old)):
                _remove_folder(self._folder(old))


class _Digest(NamedTuple):
    sha256: str
    size: int  # bytes


class _Manifest(NamedTuple):
    """What manifest.json of a finished checkpoint says.

    Attributes:
      files: by path within the folder.
      step: None in those of version 0.1, which have nothing but the files.
      about: see `Checkpoints`.
    """

    files: dict[str, _Digest]
    step: int | None
    about: dict[str, Any]


def _read_manifest(folder: epath.Path) -> _Manifest | None:
    """None if it cannot be read, or is none."""
    try:
        content = json.loads((folder / _MANIFEST).read_text())
        if not isinstance(content.get("files"), dict):
            content = {"files": content, "step": None, "about": {}}
        files = {
            name: _Digest(str(entry["sha256"]), int(entry["size"]))
            for name, entry in content["files"].items()
        }
        return _Manifest(files, content["step"], dict(content["about"]))
    except (OSError, ValueError, TypeError, AttributeError, KeyError, OverflowError):
        return None


def _damage(folder: epath.Path) -> str | None:
    """The first way in which a checkpoint disagrees with its manifest, or None."""
    manifest = _read_manifest(folder)
    if manifest is None:
        return f"{_MANIFEST} is not readable"
    if manifest.step not in (None, int(folder.name)):
        return f"it was saved as step {manifest.step} and renamed"
    expected = manifest.files
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


def _write_manifest(folder: epath.Path, about: Mapping[str, Any]) -> None:
    files = {name: _digest(folder / name)._asdict() for name in sorted(_payload_files(folder))}
    temporary = folder / f"{_MANIFEST}.tmp"
    content = {"step": int(folder.name), "files": files, "about": about}
    temporary.write_text(json.dumps(content, indent=1))
    temporary.replace(folder / _MANIFEST)
    (folder / UNFINISHED).unlink(missing_ok=True)


def _payload_files(folder: epath.Path, prefix: str = "") -> Iterator[str]:
    """Paths of all files but this module's own, relative to the checkpoint's folder."""
    # Not `folder.walk()`, which gives gs://bucket/x as bucket/x.
    for path in folder.iterdir():
        name = prefix + path.name
        if path.is_dir():
            yield from _payload_files(path, f"{name}/")
        elif name not in _OUR_FILES:
            yield name


def _digest(path: epath.Path) -> _Digest:
    sha256, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK_BYTES):
            sha256.update(chunk)
            size += len(chunk)
    return _Digest(sha256.hexdigest(), size)


def _remove_folder(folder: epath.Path) -> None:
    """Removes a checkpoint's own files, and the folder if nothing else is in it; says what is."""
    manifest = _read_manifest(folder)
    listed = set() if manifest is None else set(manifest.files)
    if (folder / _MANIFEST).exists():
        # The manifest goes first: a folder whose removal is interrupted then counts as unfinished.
        with contextlib.suppress(OSError):  # On a full disk, where it would count as none of ours.
            (folder / UNFINISHED).touch()
        (folder / _MANIFEST).unlink()
    others = _remove_files(folder, listed)
    if others:
        logging.warning(
            "Checkpoint folder %s keeps %s, which the run did not write.",
            *(folder, ", ".join(sorted(others)[:3]) + (" and more" if len(others) > 3 else "")),
        )


def _remove_files(folder: epath.Path, listed: set[str], prefix: str = "") -> list[str]:
    """Removes from a folder what is listed or has a name of ours or Orbax's; returns the other files.

    The marker of an unfinished folder goes last, and then the folder, if it is empty.
    """
    others = []
    for path in sorted(folder.iterdir(), key=lambda path: path.name == UNFINISHED):
        name = prefix + path.name
        if path.is_dir() and not _is_link(path):
            others += _remove_files(path, listed, f"{name}/")
        elif not _is_link(path) and (
            name in listed or name in _OUR_FILES or _ORBAX_FILE.fullmatch(name)
        ):
            path.unlink(missing_ok=True)
        else:
            others.append(name)
    if not others and is_remote(folder):
        folder.rmtree(missing_ok=True)  # An object store need not have empty folders.
    elif not others:
        os.rmdir(folder)  # `epath` would remove what is written into it in this moment.
    return others


def _move_aside(path: epath.Path) -> None:
    """Renames what is left where a checkpoint is to be written; it is not the run's."""
    if not _is_link(path) and not path.exists():
        return
    names = (f"kept{number}-{path.name}" for number in itertools.count(1))
    places = (path.parent / name for name in names)
    place = next(place for place in places if not _is_link(place) and not place.exists())
    path.rename(place)
    logging.warning(
        "%s was in the way of a checkpoint and is not the run's; it is %s now.", path, place.name
    )


def _is_orbax(folder: epath.Path) -> bool:
    """Whether nothing but Orbax's files is in a folder, of which the first may be yet to come."""
    return all(_ORBAX_FILE.fullmatch(name) for name in _payload_files(folder))


def _is_link(path: epath.Path) -> bool:
    return not is_remote(path) and os.path.islink(path)


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
