"""Folders of safetensors files: read by parts of tensors, written one tensor at a time."""

import dataclasses
import json
import math
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors

from moe_jax.errors import UserError
from moe_jax.interop.huggingface.layout import Region

CONFIG = "config.json"
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_ADAPTER = "adapter_config.json"
_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": np.dtype(jnp.bfloat16),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
# Bytes that the header's length takes, and a multiple of which the header is.
_LENGTH_BYTES = 8


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a tensor is and what it is like.

    Attributes:
      file: its file.
      name: its name there.
      shape: its shape.
      dtype: its dtype.
      index: of an axis before the first one, where the tensor is a part of the file's; None where
        there is none.
      start: where along its first axis it begins in the file's.
    """

    file: pathlib.Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    index: int | None = None
    start: int = 0


def read_config(folder: os.PathLike[str] | str) -> dict[str, Any]:
    """config.json.

    Raises:
      UserError: there is none, it is damaged, or an adapter is beside it.
    """
    # Unlike pathlib's, this has an answer to every error.
    if os.path.exists(pathlib.Path(folder) / _ADAPTER):
        raise UserError(
            f"{folder} has an {_ADAPTER}, whose numbers change the model's; merge the adapter into the "
            "model and save that."
        )
    try:
        return read_json(pathlib.Path(folder) / CONFIG)
    except OSError as error:
        raise UserError(
            f"{folder} has no readable {CONFIG} ({error.strerror}); name a folder of a Hugging Face "
            "model."
        ) from error


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      UserError: there is something else.
      OSError: it cannot be read.
    """
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # What is not UTF-8, too.
        raise UserError(f"{path} is damaged ({error}); copy it again.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, not an object; copy it again.")
    return value


def tensors_of(folder: os.PathLike[str] | str) -> dict[str, Stored]:
    """All tensors of a folder by name; the index, where it counts, says in which file each one is.

    Raises:
      UserError: there are no safetensors files, one is missing or damaged, or a tensor has a dtype
        that is not supported.
    """
    place = pathlib.Path(folder)
    # With both, transformers takes the single file.
    if os.path.exists(place / _SINGLE):
        return _tensors_in(place / _SINGLE)
    if not os.path.exists(place / _INDEX):
        raise UserError(
            f"{folder} has neither {_SINGLE} nor {_INDEX}; save the model with safetensors."
        )
    files_of = _weight_map(place / _INDEX)
    in_files = {file: _tensors_in(place / file) for file in sorted(set(files_of.values()))}
    found = {}
    for name, file in files_of.items():
        if name not in in_files[file]:
            raise UserError(
                f"{place / _INDEX} has tensor {name} in {file}, which does not hold it; copy the folder "
                "again."
            )
        found[name] = in_files[file][name]
    return found


def _weight_map(path: pathlib.Path) -> dict[str, str]:
    """The file's name of each tensor.

    Raises:
      UserError: the index is damaged, or names files that are not beside it.
    """
    try:
        names = read_json(path).get("weight_map")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); copy it again.") from error
    if not isinstance(names, dict) or not names:
        raise UserError(f"{path} has no weight_map with the file of each tensor; copy it again.")
    for tensor, name in names.items():
        if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\\0"):
            raise UserError(
                f"{path} has tensor {tensor} in {name!r}, which is no file of its folder; copy it again."
            )
    return names


def _tensors_in(path: pathlib.Path) -> dict[str, Stored]:
    """The tensors of one file."""
    found: dict[str, Stored] = {}
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 - no dict.
                part = file.get_slice(name)
                if part.get_dtype() not in _DTYPES:
                    raise UserError(
                        f"tensor {name} of {path} is of dtype {part.get_dtype()}; convert it to one of "
                        f"{', '.join(_DTYPES)}."
                    )
                shape = tuple(part.get_shape())
                found[name] = Stored(path, name, shape, _DTYPES[part.get_dtype()])
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}); copy it again.") from error
    return found


def read(stored: Stored, region: Region) -> np.ndarray:
    """A region of a tensor.

    The file is opened for it alone, because what was read of a file counts as this process's memory
    until it is closed.
    """
    if stored.start:
        first = slice(region[0].start + stored.start, region[0].stop + stored.start)
        region = (first, *region[1:])
    with safetensors.safe_open(stored.file, framework="numpy") as file:
        part = file.get_slice(stored.name)
        if stored.index is None:
            return part[region]
        return part[(slice(stored.index, stored.index + 1), *region)][0]


@dataclasses.dataclass(frozen=True)
class Written:
    """A tensor to be written.

    Attributes:
      name: of the tensor.
      shape: its shape.
      dtype: its dtype.
      read: returns it; called once, when its turn comes.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_folder(
    folder: os.PathLike[str] | str,
    config: dict[str, Any],
    tensors: Sequence[Written],
    max_shard_bytes: int,
) -> None:
    """Writes a model's folder, which appears once it is complete.

    Args:
      folder: must not exist.
      config: what config.json says.
      tensors: in the order of the files.
      max_shard_bytes: a file has fewer bytes of tensors, or only one tensor.

    Raises:
      UserError: the folder exists.
    """
    target = pathlib.Path(folder)
    if target.exists():
        raise UserError(f"{target} exists; choose another folder or remove it.")
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that renaming is one step.
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        (temporary / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        shards = _shards(tensors, max_shard_bytes)
        names = (
            [_SINGLE]
            if len(shards) == 1
            else [
                f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
            ]
        )
        for name, shard in zip(names, shards, strict=True):
            _write_file(temporary / name, shard)
        if len(shards) > 1:
            weight_map = {t.name: n for n, shard in zip(names, shards, strict=True) for t in shard}
            total = {"total_size": sum(tensor.nbytes for tensor in tensors)}
            index = {"metadata": total, "weight_map": weight_map}
            (temporary / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        temporary.chmod(0o755)  # Temporary folders are private.
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _shards(tensors: Sequence[Written], max_bytes: int) -> list[list[Written]]:
    shards: list[list[Written]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def _write_file(path: pathlib.Path, tensors: Sequence[Written]) -> None:
    """The library writes a file's tensors at once, which would all have to be in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": [start, start + tensor.nbytes],
        }
        start += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(_LENGTH_BYTES, "little"))
        file.write(text)
        for tensor in tensors:
            # As bytes: numpy does not write bfloat16 itself.
            file.write(np.ascontiguousarray(tensor.read()).reshape(-1).view(np.uint8).data)
