"""Finding a prepared dataset by name or by directory, and reading its examples."""

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

from etils import epy

from moe_jax.data.builders import builders
from moe_jax.data.remembered import file_name, remembered, stamps
from moe_jax.errors import UserError

with epy.lazy_imports():  # They take longer to import than all the rest.
    import tensorflow_datasets as tfds
    from array_record.python import array_record_module


@dataclasses.dataclass(frozen=True)
class OpenedDataset:
    """One split of a prepared dataset, readable at random.

    Attributes:
      name: name, configuration and version, such as `debian_text/1.0.0`.
      file_sha256: the sha256 of each record file of the split, by file name.
    """

    name: str
    split: str
    directory: pathlib.Path
    features: Mapping[str, "tfds.features.FeatureConnector"]
    examples: Sequence[Mapping[str, Any]]
    file_sha256: Mapping[str, str]

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        """Yields every example in order.

        Raises:
          UserError: see `example`.
        """
        for index in range(len(self.examples)):
            yield self.example(index)

    def example(self, index: int) -> Mapping[str, Any]:
        """One example by its number.

        Raises:
          UserError: its record cannot be read, or lacks a feature, which TFDS takes for None.
        """
        with self.reading():
            example = self.examples[index]
        for name, feature in self.features.items():
            missing = example.get(name, "") is None
            if missing and not getattr(feature.get_tensor_info(), "optional", False):
                reason = f"example {index} has no {name}"
                raise _damaged(self.directory, self.name, self.split, reason)
        return example

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """While examples are read: a stranger's record files may hold anything.

        Raises:
          UserError: a record cannot be read or decoded.
        """
        try:
            yield
        except (UserError, MemoryError):
            raise
        except Exception as error:  # The readers and decoders of a dataset raise what they please.
            raise _damaged(self.directory, self.name, self.split, _reason(error)) from error


def resolve_data_dir(data_dir: str) -> pathlib.Path:
    """Returns `data_dir`, or where TFDS keeps its data if that is empty."""
    data_dir = data_dir or os.environ.get("TFDS_DATA_DIR", "") or "~/tensorflow_datasets"
    return pathlib.Path(data_dir).expanduser()


def prepare_dataset(name: str, data_dir: str) -> "tfds.core.GeneratorBasedBuilder":
    """Makes one of the project's own datasets in `data_dir`, unless it is there.

    Progress goes to stderr.

    Raises:
      UserError: the name is unknown, or the builder cannot get its data.
    """
    known = builders()
    if name not in known:
        raise UserError(
            f"dataset={name!r} cannot be prepared; valid are {', '.join(known)}, and those whose "
            "builder is named by --import."
        )
    root = resolve_data_dir(data_dir)
    builder = known[name](data_dir=os.fspath(root), file_format="array_record")
    if builder.data_path.exists():
        return builder
    try:
        with contextlib.redirect_stdout(sys.stderr):  # TFDS prints to stdout when it is done.
            builder.download_and_prepare()
    except OSError as error:
        # Another process may have renamed its own, equal copy into place first.
        if not builder.data_path.exists():
            raise UserError(
                f"dataset={name} could not be written to data_dir={str(root)!r} ({error.strerror}); "
                "name a folder with room that you may write to."
            ) from error
        builder = known[name](data_dir=os.fspath(root), file_format="array_record")
    return builder


def open_dataset(name_or_dir: str, data_dir: str, split: str) -> OpenedDataset:
    """Opens a split of a dataset that was prepared as array_record.

    Args:
      name_or_dir: one of the project's datasets (`python_library` is prepared on first use), a
        TFDS name such as `lm1b`, or the directory that holds a `dataset_info.json`.
      data_dir: where datasets are found by name; empty for `$TFDS_DATA_DIR` or
        `~/tensorflow_datasets`.
      split: a split's name, or a TFDS slice of it such as `train[:10%]`.

    Raises:
      UserError: there is no such dataset or split, or its files are damaged.
    """
    try:
        with _without_imports(name_or_dir):
            builder = _find_builder(name_or_dir, data_dir)
            info, directory = builder.info, pathlib.Path(builder.data_path)
            info.splits, info.features  # noqa: B018 - TFDS reads some of its files on demand.
    except (UserError, OSError):
        raise
    except Exception as error:  # TFDS's parsers raise what they please.
        reason = " ".join(str(error).split()).replace(". ", "; ").rstrip(".")[:200]
        raise UserError(
            f"dataset={name_or_dir!r} has a dataset_info.json or features.json that TFDS cannot read "
            f"({type(error).__name__}: {reason}); prepare it anew."
        ) from error
    try:
        examples = builder.as_data_source(split=split)
    except (KeyError, NotImplementedError, ValueError) as error:
        raise _cannot_open(name_or_dir, resolve_data_dir(data_dir), builder, split) from error
    return OpenedDataset(
        name=info.full_name,
        split=split,
        directory=directory,
        features=info.features,
        examples=examples,
        file_sha256=_checked_files(builder, split),
    )


@contextlib.contextmanager
def _without_imports(name: str) -> Iterator[None]:
    """While a dataset is opened, its files get no module imported.

    TFDS imports whatever module a features.json names for a feature, and a dataset may be a
    stranger's. TFDS' own features stay available, and those of modules that are imported already.

    Args:
      name: of the dataset, for the error.
    """
    feature = tfds.features.FeatureConnector
    original = feature.cls_from_name

    def guarded(class_name: str) -> Any:
        module = class_name.rpartition(".")[0]
        if module not in sys.modules and not module.startswith("tensorflow_datasets."):
            raise UserError(
                f"dataset={name!r} has a feature of type {class_name!r}, whose module is not imported, "
                f"because a dataset's files may name any; if you trust it, say --import={module}."
            )
        return original(class_name)

    with mock.patch.object(feature, "cls_from_name", guarded):
        yield


def _find_builder(name_or_dir: str, data_dir: str) -> "tfds.core.DatasetBuilder":
    root = resolve_data_dir(data_dir)
    directory = pathlib.Path(name_or_dir).expanduser()
    if (directory / "dataset_info.json").exists():
        return tfds.builder_from_directory(os.fspath(directory))
    if directory.is_absolute() or name_or_dir.startswith((".", "~")):
        raise UserError(
            f"dataset={name_or_dir!r} is not the directory of a prepared dataset: it has no "
            "dataset_info.json; name one that has, such as that of a version, ROOT/NAME/1.0.0, or one "
            f"of the names {', '.join(builders())}."
        )
    known = builders()
    if getattr(known.get(name_or_dir), "PREPARED_ON_FIRST_USE", False):
        return prepare_dataset(name_or_dir, data_dir)
    if name_or_dir in known:
        return known[name_or_dir](data_dir=os.fspath(root), file_format="array_record")
    try:
        return tfds.builder(name_or_dir, data_dir=os.fspath(root))
    except (tfds.core.DatasetNotFoundError, ImportError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"dataset={name_or_dir!r} is not prepared in {str(root)!r} and is no name that "
            "TensorFlow Datasets resolves without TensorFlow; use the directory of a dataset "
            f"prepared as array_record, or one of {', '.join(known)}."
        ) from error


def _cannot_open(
    name: str, root: pathlib.Path, builder: "tfds.core.DatasetBuilder", split: str
) -> UserError:
    """Says why TFDS refused to read a dataset at random."""
    info = builder.info
    if not builder.data_path.exists():
        return UserError(
            f"dataset={name!r} is not prepared in {str(root)!r}; run "
            f"`{_prepare_command(name, root)}`."
        )
    if info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        return UserError(
            f"dataset={name!r} in {builder.data_dir!r} has the file format "
            f"{info.file_format.value}, which cannot be read at random; prepare it with "
            "file_format=array_record."
        )
    if split.partition("[")[0] in info.splits:
        return UserError(
            f"split={split!r} of dataset={name!r} is no slice that TFDS reads; write it as in train[:10%]."
        )
    return UserError(
        f"split={split!r} is not in dataset={name!r}, which has {', '.join(info.splits)}; name one of "
        "them."
    )


def _checked_files(builder: "tfds.core.DatasetBuilder", split: str) -> dict[str, str]:
    """The sha256 of each of the split's files, by name, after counting their records.

    Counting matters: from a file cut at a multiple of 64 KiB the reader returns empty records
    without an error. Files that have the size and time of the last check are not read again.
    """
    name = split.partition("[")[0]
    info = builder.info.splits.get(name)
    if info is None:
        return {}
    files = [pathlib.Path(file) for file in info.filepaths]
    expected = list(info.shard_lengths)

    def compute() -> dict[str, str]:
        return {
            file.name: _checked(builder, split, file, count)
            for file, count in zip(files, expected, strict=True)
        }

    directory, full_name = builder.data_path, builder.info.full_name
    try:
        of = {"files": stamps(files), "records": expected}
        others = [file.name for file in files if not file.is_file()]
    except (OSError, ValueError) as error:  # A path with a null byte is a ValueError.
        raise _damaged(directory, full_name, split, _reason(error)) from error
    if others:  # From a pipe or a device the reader would never return.
        raise _damaged(directory, full_name, split, f"{others[0]} is a folder, a pipe or a device")
    return remembered(pathlib.Path(builder.data_path) / "checked" / file_name(name), of, compute)


def _checked(
    builder: "tfds.core.DatasetBuilder", split: str, file: pathlib.Path, expected: int
) -> str:
    """The sha256 of a file that has as many readable records as it should."""
    directory, full_name = builder.data_path, builder.info.full_name
    try:
        found = array_record_module.ArrayRecordReader(os.fspath(file)).num_records()
        checksum = _sha256(file)
    except (OSError, RuntimeError) as error:
        raise _damaged(directory, full_name, split, _reason(error)) from error
    if found != expected:
        reason = f"{file.name} has {found} readable records of {expected}"
        raise _damaged(directory, full_name, split, reason)
    return checksum


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _reason(error: Exception) -> str:
    """What a reader or the operating system said, in less than a sentence."""
    if isinstance(error, OSError) and error.strerror:
        return f"{pathlib.Path(str(error.filename or '')).name}: {error.strerror}"
    told = " ".join(str(error).partition(";")[0].split()).replace(". ", ", ").rstrip(".")
    return f"{type(error).__name__}: {told[:200]}"


def _damaged(directory: os.PathLike[str], full_name: str, split: str, reason: str) -> UserError:
    directory, parts = pathlib.Path(directory), full_name.split("/")
    remedy = "bring back a copy of it, or name the folder of another dataset"
    # A dataset that has its place in ROOT/NAME/VERSION can be made again; its version must go.
    if directory.parts[-len(parts) :] == tuple(parts):
        root, name = directory.parents[len(parts) - 1], "/".join(parts[:-1])
        remedy = f"delete that folder and run `{_prepare_command(name, root)}`"
    return UserError(
        f"the split {split!r} in {str(directory)!r} is damaged or incomplete ({reason}); {remedy}."
    )


def _prepare_command(name: str, root: pathlib.Path) -> str:
    builder = builders().get(name)
    if builder is not None:
        own = builder.__module__.startswith("moe_jax.")
        named = "" if own else f" --import={builder.__module__}"
        return f"python -m moe_jax prepare_data --dataset={name} --data_dir={root}{named}"
    return f"tfds build {name} --file_format=array_record --data_dir={root}"
