"""Rows of numbers: a few inputs and the targets that they should predict.

Axis letters: B batch (global rows of a step), R rows of a split, n inputs, m targets.
"""

import abc
import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from moe_jax.component import field
from moe_jax.data.interface import DataConfig
from moe_jax.data.rows import Row, RowPipeline, Split
from moe_jax.data.sources import OpenedDataset, open_dataset
from moe_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of one split.

    Attributes:
      inputs: [R, n] float32.
      targets: [R, m] float32.
      domain: [R] names.
    """

    inputs: np.ndarray
    targets: np.ndarray
    domain: np.ndarray

    @property
    def sha256(self) -> str:
        """Of all numbers and names, as hexadecimal digits."""
        digest = hashlib.sha256()
        for array in (self.inputs, self.targets):
            digest.update(repr((array.shape, str(array.dtype))).encode() + array.tobytes())
        digest.update("\0".join(self.domain.tolist()).encode())
        return digest.hexdigest()

    def by_domain(self) -> dict[str, list[Row]]:
        """The rows of each domain, in order."""
        rows: dict[str, list[Row]] = {str(name): [] for name in np.unique(self.domain)}
        for inputs, targets, domain in zip(self.inputs, self.targets, self.domain, strict=True):
            rows[str(domain)].append({"inputs": inputs, "targets": targets})
        return rows


class TablePipeline(RowPipeline):
    """Rows of tables in training order, and held-out batches.

    A batch has `inputs`, float32 [B, n], and `targets`, float32 [B, m].

    Attributes:
      tables: split -> its rows.
    """

    def __init__(
        self, name: str, tables: Mapping[str, Table], train_split: str, batch_size: int, seed: int
    ) -> None:
        """Orders the rows of `train_split`."""
        self.tables = dict(tables)
        self._name = name
        self._training = self.tables[train_split]
        super().__init__(name, self._training.by_domain(), batch_size, seed, {})
        self.sha256 = self._training.sha256

    def open_split(self, split: str) -> Split:
        """See `RowPipeline`."""
        if split not in self.tables:
            raise UserError(
                f"split={split!r} is not in dataset={self._name!r}, which has "
                f"{', '.join(self.tables)}."
            )
        return self.tables[split].by_domain()

    def record(self) -> dict[str, Any]:
        """See `Pipeline`; `trivial_loss` is the squared error of the training targets' mean."""
        targets = self._training.targets
        return {
            "name": self._name,
            "sha256": self.sha256,
            "train_rows": len(targets),
            "trivial_loss": float(((targets - targets.mean(axis=0)) ** 2).sum(axis=1).mean()),
        }


@dataclasses.dataclass
class TableConfig(DataConfig):
    """What the data of a `TablePipeline` say of their rows.

    Attributes:
      held_out_split: see `DataConfig`; these data have no split `validation`.
    """

    held_out_split: str = "test"

    @property
    def tokens_per_row(self) -> int:
        """1: throughput counts rows."""
        return 1

    @property
    def row_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """See `DataConfig`."""
        return {
            "inputs": jax.ShapeDtypeStruct((self.num_inputs,), np.float32),
            "targets": jax.ShapeDtypeStruct((self.num_targets,), np.float32),
        }

    @property
    @abc.abstractmethod
    def num_inputs(self) -> int:
        """n."""

    @property
    @abc.abstractmethod
    def num_targets(self) -> int:
        """m."""

    @property
    @abc.abstractmethod
    def has_classes(self) -> bool:
        """Whether every target is 0 or 1."""


@dataclasses.dataclass
class TableData(TableConfig):
    """Numbers of a dataset's examples that predict which class each belongs to.

    Attributes:
      dataset: a name or a directory: see `moe_jax.data.sources.open_dataset`.
      data_dir: where datasets are found by name; empty for $TFDS_DATA_DIR or
        ~/tensorflow_datasets.
      train_split: the split, or a TFDS slice of one, that is trained on.
      input_features: the n features that are the inputs.
      input_divisor: inputs are divided by this; 1000 turns Hz into kHz.
      class_feature: the feature that names an example's class; it is also the row's domain.
      classes: the classes that are used; examples of others are left out.
      class_targets: the single target of each class; empty for one target per class, 1 for its
        own, else 0.
    """

    dataset: str = "peterson_barney"
    data_dir: str = ""
    train_split: str = "train"
    input_features: tuple[str, ...] = ("f1", "f2")
    input_divisor: float = field(1000.0, above=0)
    class_feature: str = "vowel"
    classes: tuple[str, ...] = ("iy", "ih", "aa", "ah")
    class_targets: tuple[float, ...] = ()

    @property
    def num_inputs(self) -> int:
        """n."""
        return len(self.input_features)

    @property
    def num_targets(self) -> int:
        """m."""
        return 1 if self.class_targets else len(self.classes)

    @property
    def has_classes(self) -> bool:
        """See `TableConfig`."""
        return set(self.class_targets) <= {0, 1}

    def validate(self) -> None:
        """See `DataConfig`."""
        super().validate()
        for name in ("input_features", "classes"):
            if not getattr(self, name):
                raise UserError(f"data.{name} is empty; name at least one.")
        if self.class_targets and len(self.class_targets) != len(self.classes):
            raise UserError(
                f"data.class_targets has {len(self.class_targets)} entries for "
                f"{len(self.classes)} data.classes; give one for each, or none."
            )

    def open(self, seed: int) -> TablePipeline:
        """See `DataConfig`; batches of evaluation come from `held_out_split` alone."""
        self.validate()
        tables = {
            split: self._table(open_dataset(self.dataset, self.data_dir, split))
            for split in dict.fromkeys((self.train_split, self.held_out_split))
        }
        return TablePipeline(self.dataset, tables, self.train_split, self.batch_size, seed)

    def _table(self, dataset: OpenedDataset) -> Table:
        for feature in (*self.input_features, self.class_feature):
            if feature not in dataset.features:
                raise UserError(
                    f"feature {feature!r} is not in dataset={self.dataset!r}, which has "
                    f"{', '.join(dataset.features)}; name some of them."
                )
        inputs, chosen = [], []
        for example in dataset:
            name = example[self.class_feature].decode()
            if name in self.classes:
                inputs.append([example[feature] for feature in self.input_features])
                chosen.append(self.classes.index(name))
        missing = [name for i, name in enumerate(self.classes) if i not in chosen]
        if missing:
            raise UserError(
                f"data.classes names {missing[0]!r}, of which split={dataset.split!r} of "
                f"dataset={self.dataset!r} has no example; name classes that it has."
            )
        numbers = np.array(inputs, np.float64)
        if not np.isfinite(numbers).all():
            broken = int((~np.isfinite(numbers)).any(axis=1).sum())
            raise UserError(
                f"split={dataset.split!r} of dataset={self.dataset!r} has {broken} of {len(numbers)} rows "
                "with inputs that are not finite; leave them out, or take other data.input_features."
            )
        values = (
            np.array(self.class_targets)[:, None]
            if self.class_targets
            else np.eye(len(self.classes))
        )
        return Table(
            (numbers / self.input_divisor).astype(np.float32),
            values[chosen].astype(np.float32),
            np.array(self.classes)[chosen],
        )
