"""Text as rows of equal length, cut from a packed dataset.

Axis letters: B batch (global rows of a step), L sequence length.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from moe_jax.component import field
from moe_jax.data.corpus import CorpusData
from moe_jax.data.packing import PackedText, pack
from moe_jax.data.rows import Row, RowPipeline, Split
from moe_jax.data.sources import OpenedDataset
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.errors import UserError


@dataclasses.dataclass
class TextData(CorpusData):
    """Which text a run reads, in which tokens, proportions and row sizes.

    Attributes:
      domain_feature: the feature that labels the text; empty for one domain named after the
        dataset.
      sequence_length: L: tokens predicted in a row.
    """

    text_feature: str = "text"
    domain_feature: str = "domain"
    sequence_length: int = field(256, at_least=1)

    @property
    def tokens_per_row(self) -> int:
        """L."""
        return self.sequence_length

    @property
    def row_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """See `DataConfig`."""
        return {"tokens": jax.ShapeDtypeStruct((self.sequence_length + 1,), np.int32)}

    def open(self, seed: int) -> "TextPipeline":
        """Opens, and if necessary prepares, tokenises and packs, the training split."""
        return TextPipeline(self, seed)

    def reopen(self, seed: int, workdir: epath.PathLike) -> "TextPipeline":
        """With the run's own tokenizer, which need not be learned again."""
        return TextPipeline(self, seed, self.tokenizer.load(workdir))


class TextPipeline(RowPipeline):
    """Rows of a packed dataset in training order, and held-out batches.

    Rows are `tokens`, int32 [L + 1]: inputs `[:-1]`, targets `[1:]`. Reading is thread-safe.

    Attributes:
      train: the packed training split, with its `sha256` and `unigram_entropy()`.
      tokenizer: of the rows.
    """

    tokenizer: Tokenizer

    def __init__(self, config: TextData, seed: int, tokenizer: Tokenizer | None = None) -> None:
        """Opens, and if necessary prepares, tokenises and packs, the training split.

        Args:
          config: what to read.
          seed: determines the training order; any integer from 0.
          tokenizer: of a run that has begun; None to learn it or find it learned.

        Raises:
          UserError: the dataset or one of its domains does not exist or is damaged, or no domain
            has a whole row.
        """
        config.validate()
        self._config = config
        dataset = config.open_dataset(config.train_split)
        self.tokenizer = tokenizer or config.learned_tokenizer(dataset, [config.text_feature])
        self.train = self._packed(dataset)
        self.sha256 = self.train.sha256
        if not self.train.num_tokens:
            raise UserError(
                f"sequence_length={config.sequence_length} is longer than the text of every domain "
                f"of dataset={config.dataset!r}; a shorter one is needed."
            )
        super().__init__(
            config.dataset,
            _rows_of(self.train),
            config.batch_size,
            seed,
            config.domain_weights,
            row=f"row of sequence_length={config.sequence_length}",
        )

    def open_split(self, split: str) -> Split:
        """See `RowPipeline`."""
        return _rows_of(self._packed(self._config.open_dataset(split)))

    def record(self) -> dict[str, Any]:
        """See `Pipeline`."""
        return {
            "name": self._config.dataset,
            "sha256": self.sha256,
            "train_tokens": self.train.num_tokens,
            "bytes_per_token": self.train.streams.bytes_per_token,
            "trivial_loss": self.train.unigram_entropy(),
        }

    def _packed(self, dataset: OpenedDataset) -> PackedText:
        config = self._config
        cache = dataset.directory / "packed"
        features = [config.text_feature]
        folder = pack(dataset, self.tokenizer, features, config.domain_feature, cache)
        return PackedText(folder, config.sequence_length)


def _rows_of(packed: Mapping[str, np.ndarray]) -> Split:
    return {domain: _TokenRows(rows) for domain, rows in packed.items()}


class _TokenRows(Sequence[Row]):
    """The rows of one domain, read when they are asked for."""

    def __init__(self, rows: np.ndarray) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return {"tokens": self._rows[index].astype(np.int32)}
