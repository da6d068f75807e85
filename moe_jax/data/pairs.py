"""Sentences with their translations, as padded rows of source and target.

Axis letters: M tokens of an input, N tokens of a target, P languages.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from moe_jax.data.corpus import CorpusData
from moe_jax.data.packing import TokenStreams, entropy, pack
from moe_jax.data.rows import Row, RowPipeline, Split
from moe_jax.data.sources import OpenedDataset
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.errors import UserError

LANGUAGE_NAMES = {
    "cs": "Czech",
    "de": "German",
    "en": "English",
    "es": "Spanish",
    "et": "Estonian",
    "fi": "Finnish",
    "fr": "French",
    "hi": "Hindi",
    "it": "Italian",
    "ja": "Japanese",
    "lt": "Lithuanian",
    "lv": "Latvian",
    "nl": "Dutch",
    "pl": "Polish",
    "pt": "Portuguese",
    "ro": "Romanian",
    "ru": "Russian",
    "tr": "Turkish",
    "zh": "Chinese",
}
"""What an instruction calls a language: those of `translations` and of WMT."""

INSTRUCTION = re.compile(r"translate \w+ to \w+: ")
"""What `PairData.instruction_of` makes; its tokens do not depend on the source that follows."""


@dataclasses.dataclass
class PairData(CorpusData):
    """Which translations a run reads, in which tokens, proportions and row sizes.

    The dataset has a text feature for every language, as TFDS' `Translation` has, and an empty text
    where there is no translation. A domain is a pair of languages. A translation that is longer
    than a row is left out, and counted in the run's record.

    Attributes:
      pairs: source and target: `en-de` is from English into German.
      instruction: whether inputs begin with T5's `translate English to German: `, which tells a
        model of several pairs what is wanted (arXiv:1910.10683, appendix D.15).
      input_length: M: tokens of an input, instruction and EOS included.
      target_length: N: tokens of a target, EOS included.
    """

    dataset: str = "translations"
    pairs: tuple[str, ...] = ("en-de",)
    instruction: bool = True
    input_length: int = 128
    target_length: int = 128

    def validate(self) -> None:
        """See `CorpusData`."""
        super().validate()
        for field in ("input_length", "target_length"):
            if getattr(self, field) < 2:
                raise UserError(
                    f"data.{field} is {getattr(self, field)}; it must be at least 2, for a token "
                    "and EOS."
                )
        if not self.pairs:
            raise UserError("data.pairs is empty; it must name a pair of languages, such as en-de.")
        for pair in self.pairs:
            source, _, target = pair.partition("-")
            if not (source and target and source != target):
                raise UserError(
                    f"data.pairs has {pair!r}; it must be two languages, such as 'en-de'."
                )
            unknown = [language for language in (source, target) if language not in LANGUAGE_NAMES]
            if self.instruction and unknown:
                raise UserError(
                    f"data.pairs has {pair!r}, but no instruction can name the language "
                    f"{unknown[0]!r}; set data.instruction=false or use "
                    f"{', '.join(LANGUAGE_NAMES)}."
                )

    @property
    def languages(self) -> list[str]:
        """[P] all languages of the pairs, sorted."""
        return sorted({language for pair in self.pairs for language in pair.split("-")})

    @property
    def tokens_per_row(self) -> int:
        """M + N, PAD included."""
        return self.input_length + self.target_length

    @property
    def row_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """See `DataConfig`."""
        return {
            "inputs": jax.ShapeDtypeStruct((self.input_length,), np.int32),
            "targets": jax.ShapeDtypeStruct((self.target_length + 1,), np.int32),
        }

    def instruction_of(self, pair: str) -> str:
        """What the inputs of a pair begin with."""
        if not self.instruction:
            return ""
        source, target = (LANGUAGE_NAMES[language] for language in pair.split("-"))
        return f"translate {source} to {target}: "

    def open(self, seed: int) -> "PairPipeline":
        """Opens, and if necessary tokenises, the training split."""
        return PairPipeline(self, seed)

    def reopen(self, seed: int, workdir: epath.PathLike) -> "PairPipeline":
        """With the run's own tokenizer, which need not be learned again."""
        return PairPipeline(self, seed, self.tokenizer.load(workdir))


class TranslationTokens:
    """Sentences in several languages: an example is P texts, some of them empty.

    Attributes:
      tokens: all texts, memory-mapped.
      starts: int64 [examples, P], where each text begins.
      ends: int64 [examples, P], where the token follows that ends it.
    """

    def __init__(self, tokens: np.ndarray, num_languages: int, tokenizer: Tokenizer) -> None:
        """Finds the texts of `tokens`, a domain of `TokenStreams`.

        Raises:
          UserError: a text has a token in it that only stands between texts.
        """
        self.tokens = tokens
        ends = np.flatnonzero(np.isin(tokens, (tokenizer.BOS, tokenizer.EOS)))
        between = [*[tokenizer.BOS] * (num_languages - 1), tokenizer.EOS]
        if len(ends) % num_languages or (tokens[ends].reshape(-1, num_languages) != between).any():
            raise UserError(
                f"a text of the dataset has the token {tokenizer.BOS} or {tokenizer.EOS} of the "
                f"tokenizer {tokenizer.name!r} in it, which begin and end texts (as the text </s> may "
                "be); remove it from the dataset's texts."
            )
        self.starts = np.concatenate([[0], ends + 1])[:-1].reshape(-1, num_languages)
        self.ends = ends.reshape(-1, num_languages)


class PairRows(Sequence[Row]):
    """The translations of one pair that fit into a row; rows are made when they are asked for.

    Rows are `inputs`, int32 [M], and `targets`, int32 [N + 1], which begins with BOS; both end with
    EOS, which PAD follows.

    Attributes:
      dropped: how many translations are too long.
    """

    def __init__(
        self,
        translations: TranslationTokens,
        pair: tuple[int, int],
        instruction: np.ndarray,
        lengths: tuple[int, int],
        tokenizer: Tokenizer,
    ) -> None:
        """Finds the translations of a pair.

        Args:
          translations: all languages.
          pair: numbers of the source and the target language.
          instruction: tokens that inputs begin with.
          lengths: M and N.
          tokenizer: whose BOS and EOS frame the rows.
        """
        self._tokens, self._instruction, self._lengths = translations.tokens, instruction, lengths
        self._begin, self._end = tokenizer.BOS, tokenizer.EOS
        columns = list(pair)
        starts, ends = translations.starts[:, columns], translations.ends[:, columns]
        exists = (ends > starts).all(axis=1)
        room = np.array([lengths[0] - len(instruction) - 1, lengths[1] - 1])
        fits = exists & (ends - starts <= room).all(axis=1)
        self.dropped = int(np.sum(exists & ~fits))
        self._starts, self._ends = starts[fits], ends[fits]

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: Any) -> Any:
        source, target = (
            self._tokens[start:end]
            for start, end in zip(self._starts[index], self._ends[index], strict=True)
        )
        end = [self._end]
        input_length, target_length = self._lengths
        return {
            "inputs": _padded(np.concatenate([self._instruction, source, end]), input_length),
            "targets": _padded(np.concatenate([[self._begin], target, end]), target_length + 1),
        }

    def target_counts(self, vocab_size: int) -> np.ndarray:
        """How often each token is to be predicted, EOS included: int64 [vocabulary]."""
        steps = np.zeros(len(self._tokens) + 1, np.int8)
        steps[self._starts[:, 1]] = 1
        steps[self._ends[:, 1]] = -1
        inside = np.cumsum(steps[:-1], dtype=np.int8) == 1
        counts = np.bincount(self._tokens[inside], minlength=vocab_size)
        counts[self._end] += len(self)
        return counts


def _padded(tokens: np.ndarray, length: int) -> np.ndarray:
    """Int32 [length]: `tokens`, then PAD."""
    row = np.full(length, Tokenizer.PAD, np.int32)
    row[: len(tokens)] = tokens
    return row


class PairPipeline(RowPipeline):
    """Rows of translations in training order, and held-out batches; see `PairRows`.

    Reading is thread-safe.
    """

    tokenizer: Tokenizer

    def __init__(self, config: PairData, seed: int, tokenizer: Tokenizer | None = None) -> None:
        """Opens, and if necessary tokenises, the training split.

        Args:
          config: what to read.
          seed: determines the training order; any integer from 0.
          tokenizer: of a run that has begun; None to learn it or find it learned.

        Raises:
          UserError: the dataset or one of its languages does not exist or is damaged, or no
            translation fits into a row.
        """
        config.validate()
        self._config = config
        dataset = config.open_dataset(config.train_split)
        _check_languages(config, dataset)
        self.tokenizer = tokenizer or config.learned_tokenizer(dataset, config.languages)
        streams = self._streams(dataset)
        self.sha256, self._bytes_per_token = streams.sha256, streams.bytes_per_token
        self._rows = self._rows_of(streams)
        super().__init__(
            config.dataset,
            self._rows,
            config.batch_size,
            seed,
            config.domain_weights,
            row=f"translation of at most input_length={config.input_length} and "
            f"target_length={config.target_length} tokens",
        )

    def open_split(self, split: str) -> Split:
        """See `RowPipeline`."""
        return self._rows_of(self._streams(self._config.open_dataset(split)))

    def record(self) -> dict[str, Any]:
        """See `Pipeline`; `dropped_rows` are too long, `train_tokens` those to be predicted."""
        vocab_size = self.tokenizer.vocab_size
        counts = np.sum([rows.target_counts(vocab_size) for rows in self._rows.values()], axis=0)
        return {
            "name": self._config.dataset,
            "sha256": self.sha256,
            "train_rows": self.rows_per_epoch,
            "dropped_rows": sum(rows.dropped for rows in self._rows.values()),
            "train_tokens": int(counts.sum()),
            "bytes_per_token": self._bytes_per_token,
            "trivial_loss": entropy(counts),
        }

    def _streams(self, dataset: OpenedDataset) -> TokenStreams:
        languages, cache = self._config.languages, dataset.directory / "packed"
        return TokenStreams(pack(dataset, self.tokenizer, languages, "", cache))

    def _rows_of(self, streams: TokenStreams) -> dict[str, PairRows]:
        config, languages = self._config, self._config.languages
        # A split without an example has no stream.
        tokens = next(iter(streams.values()), np.empty(0, self.tokenizer.dtype))
        translations = TranslationTokens(tokens, len(languages), self.tokenizer)
        rows = {}
        for pair in config.pairs:
            source, target = (languages.index(language) for language in pair.split("-"))
            instruction = self.tokenizer.encode(config.instruction_of(pair))
            lengths = (config.input_length, config.target_length)
            rows[pair] = PairRows(
                translations, (source, target), instruction, lengths, self.tokenizer
            )
        return rows


def _check_languages(config: PairData, dataset: OpenedDataset) -> None:
    for language in config.languages:
        if language not in dataset.features:
            raise UserError(
                f"data.pairs has the language {language!r}, which dataset={dataset.name!r} lacks; it "
                f"has {', '.join(dataset.features)}; name pairs of them."
            )
