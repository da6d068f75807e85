"""The contract between data and the trainer: a config is opened to a pipeline of batches.

Axis letters: B batch (global rows of a step), D domains.

`moe_jax.data.rows.RowPipeline` does most of it for data that are rows of arrays in domains.
"""

import abc
import dataclasses
from typing import Any

import jax
import numpy as np
from etils import epath

from moe_jax.component import Component, field
from moe_jax.data.tokenizers import Tokenizer


class Pipeline(abc.ABC):
    """Opened data. The global batch is a pure function of (seed, step), so there is no state.

    Attributes:
      domains: [D] names; the `domain` of a row is an index into them.
      sha256: of the training data, as hexadecimal digits: a run does not go on with other data.
      tokenizer: of text; None for data of another kind.
    """

    domains: tuple[str, ...]
    sha256: str
    tokenizer: Tokenizer | None = None

    @abc.abstractmethod
    def rows(self, step: int, start: int, stop: int) -> dict[str, np.ndarray]:
        """Rows `start` to `stop` (excluded) of the global batch of `step`; thread-safe.

        Returns:
          Arrays with a leading axis of stop - start, among them `domain`, int32 [stop - start].
        """

    @abc.abstractmethod
    def held_out_batches(self, split: str, num_batches: int) -> list[dict[str, np.ndarray]]:
        """The same batches of `split` on every call, at most `num_batches`.

        Returns:
          The arrays of `rows`, each with a leading axis B, and `mask`, bool [B], False for rows
          that only fill up the last batch.

        Raises:
          UserError: the split does not exist or has no row.
        """

    @abc.abstractmethod
    def record(self) -> dict[str, Any]:
        """What config.json says of the data, JSON-ready.

        Returns:
          `name`, `sha256`, sizes, and `trivial_loss`: what a predictor that ignores its inputs
          reaches at best on the training rows, each counted once, in the unit of `eval/loss` (nats
          for a cross-entropy).
        """


@dataclasses.dataclass
class DataConfig(Component, abc.ABC):
    """Which data a run reads; a component of a config, and the base of all of them.

    Attributes:
      batch_size: B: rows of a step over all processes.
      held_out_split: the split or slice that is evaluated during training; lm1b, for one, calls it
        `test`.
    """

    batch_size: int = field(64, at_least=1)
    held_out_split: str = "validation"

    def validate(self) -> None:
        """Checks what can be checked without the data.

        Raises:
          UserError: a field has a value that no data make right.
        """
        self.check_ranges("data")

    @property
    @abc.abstractmethod
    def tokens_per_row(self) -> int:
        """What the throughput counts in a row: tokens, or 1 for an image or a table's row."""

    @property
    @abc.abstractmethod
    def row_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Of each array of a row but `domain`: a step is compiled from these, without the data."""

    @property
    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Of the arrays of a global batch, [B, ...]: those that `Pipeline.rows` gives for all of it."""
        rows = {**self.row_shapes, "domain": jax.ShapeDtypeStruct((), np.int32)}
        return {
            name: jax.ShapeDtypeStruct((self.batch_size, *row.shape), row.dtype)
            for name, row in rows.items()
        }

    @abc.abstractmethod
    def open(self, seed: int) -> Pipeline:
        """Opens the data; they must be prepared, but for python_library, which is prepared here.

        Args:
          seed: determines the training order; any integer from 0.

        Raises:
          UserError: the data do not exist, or are damaged or too small.
        """

    def reopen(self, seed: int, workdir: epath.PathLike) -> Pipeline:
        """Opens the data for a run that has begun: with what it learned from them, if anything."""
        return self.open(seed)
