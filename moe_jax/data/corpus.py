"""What all configs of text share: the corpus, its tokens and the proportions of its domains."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence

from moe_jax.data import packing
from moe_jax.data.interface import DataConfig
from moe_jax.data.sources import OpenedDataset, open_dataset
from moe_jax.data.tokenizers import Bytes, Tokenizer, TokenizerConfig
from moe_jax.errors import UserError


@dataclasses.dataclass
class CorpusData(DataConfig):
    """Which corpus a run reads, in which tokens and proportions; the base of configs of text.

    Attributes:
      dataset: a name or a directory: see `moe_jax.data.sources.open_dataset`.
      data_dir: where datasets are found by name; empty for $TFDS_DATA_DIR or
        ~/tensorflow_datasets.
      tokenizer: `Bytes()`, or `Subword()`, which is learned from the training split.
      train_split: the split, or a TFDS slice of one such as `train[:99%]`, that is trained on.
      domain_weights: shares of the training rows, of any sum; a domain left out is not trained on.
        Empty: every row once per epoch, so that domains appear in proportion to their size.
    """

    dataset: str = "python_library"
    data_dir: str = ""
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=Bytes)
    train_split: str = "train"
    domain_weights: dict[str, float] = dataclasses.field(default_factory=dict)

    def validate(self) -> None:
        """Checks what can be checked without the dataset.

        Raises:
          UserError: a field has a value that no dataset makes right.
        """
        super().validate()
        self.tokenizer.validate()
        for domain, weight in self.domain_weights.items():
            if not (math.isfinite(weight) and weight > 0):
                raise UserError(
                    f"data.domain_weights[{domain!r}] is {weight}; it must be a positive number; "
                    "leave a domain out to train without it."
                )

    def open_dataset(self, split: str) -> OpenedDataset:
        """Opens a split of the dataset; see `moe_jax.data.sources.open_dataset`."""
        return open_dataset(self.dataset, self.data_dir, split)

    def learned_tokenizer(self, dataset: OpenedDataset, text_features: Sequence[str]) -> Tokenizer:
        """The tokenizer, learned from these features of the training split unless that was done.

        Raises:
          UserError: a feature does not exist or is damaged, or the tokenizer cannot be written.
        """
        corpus = {**packing.identity(dataset), "text_features": list(text_features)}
        digest = hashlib.sha256(json.dumps(corpus, sort_keys=True).encode()).hexdigest()
        texts = packing.texts(dataset, text_features)
        return self.tokenizer.train(texts, digest, dataset.directory / "tokenizers")
