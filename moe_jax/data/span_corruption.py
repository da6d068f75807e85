"""T5's objective: spans of a text are replaced by sentinels, and the targets are the spans.

Raffel et al. 2020 (arXiv:1910.10683), section 3.1.4, without the closing sentinel of T5's Figure 2,
with the lengths of its code: as many tokens are read as make inputs of the wanted length, so that no
row has padding.

Axis letters: R raw tokens, M tokens of an input, N tokens of a target, S spans.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from moe_jax.component import field
from moe_jax.data.corpus import CorpusData
from moe_jax.data.interface import Pipeline
from moe_jax.data.packing import entropy
from moe_jax.data.pipelines import TextData, TextPipeline
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class SpanLengths:
    """How many tokens a corrupted row has.

    Attributes:
      raw: R, tokens that are read.
      noise: of these, how many are in a span.
      spans: S.
    """

    raw: int
    noise: int
    spans: int

    @property
    def inputs(self) -> int:
        """M: the tokens outside of spans, a sentinel for every span, and EOS."""
        return self.raw - self.noise + self.spans + 1

    @property
    def targets(self) -> int:
        """N: the tokens of the spans, a sentinel before every one, and EOS."""
        return self.noise + self.spans + 1


def span_lengths(raw: int, noise_density: float, mean_span: float) -> SpanLengths:
    """The lengths that `raw` tokens, at least 2, give: 1 to half of them are noise."""
    # At most half, so that there is a token before every span.
    noise = min(max(round(raw * noise_density), 1), raw // 2)
    return SpanLengths(raw, noise, max(round(noise / mean_span), 1))


def lengths_of_inputs(input_length: int, noise_density: float, mean_span: float) -> SpanLengths:
    """The lengths of the most raw tokens whose inputs have at most `input_length` tokens.

    512 inputs are 568 raw tokens and 114 targets at T5's density 0.15 and mean 3.

    Args:
      input_length: at least 3, the inputs of 2 raw tokens.
      noise_density: share of the raw tokens that is in spans.
      mean_span: mean length of a span.
    """
    lengths = span_lengths(2, noise_density, mean_span)
    # The inputs of another raw token are as long or longer.
    while (
        longer := span_lengths(lengths.raw + 1, noise_density, mean_span)
    ).inputs <= input_length:
        lengths = longer
    return lengths


def noise_mask(lengths: SpanLengths, random: np.random.Generator) -> np.ndarray:
    """Chooses the spans: bool [R], True inside; the text starts outside of one and ends inside.

    Lengths of spans, and of what is between them, are drawn with equal chances from all divisions
    into S parts of at least one token.
    """
    between = _division(lengths.raw - lengths.noise, lengths.spans, random)
    noise = _division(lengths.noise, lengths.spans, random)
    runs = np.stack([between, noise], axis=1).ravel()
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs)


def _division(total: int, parts: int, random: np.random.Generator) -> np.ndarray:
    """Divides `total` into positive numbers, int64 [parts]."""
    cuts = 1 + np.sort(random.choice(total - 1, parts - 1, replace=False))
    return np.diff(cuts, prepend=0, append=total)


def corrupt(
    tokens: np.ndarray, mask: np.ndarray, sentinels: np.ndarray, end_token: int = Tokenizer.EOS
) -> tuple[np.ndarray, np.ndarray]:
    """Replaces the spans of a text.

    Args:
      tokens: Int32 [R].
      mask: bool [R], True in spans.
      sentinels: int64 [at least S], each of which stands for a span.
      end_token: EOS.

    Returns:
      Inputs int32 [M]: the text with a sentinel for every span, and EOS; and targets int32 [N]:
      every span after its sentinel, and EOS.
    """
    starts = mask & ~np.concatenate([[False], mask[:-1]])
    # Before the first span the last sentinel, which nobody reads.
    of_token = sentinels[np.cumsum(starts) - 1]
    inputs = np.where(starts, of_token, tokens)[~mask | starts]
    # A sentinel is put before the first token of each span.
    first = np.flatnonzero(starts[mask])
    targets = np.insert(tokens[mask], first, of_token[starts])
    end = [end_token]
    return (
        np.concatenate([inputs, end]).astype(np.int32),
        np.concatenate([targets, end]).astype(np.int32),
    )


@dataclasses.dataclass
class SpanCorruptionData(CorpusData):
    """Which text a run reads, and how it is corrupted.

    Attributes:
      domain_feature: the feature that labels the text; empty for one domain named after the
        dataset.
      input_length: M: tokens of an input, sentinels and EOS included.
      noise_density: share of the text that is in spans.
      mean_span: mean length of a span in tokens.
    """

    text_feature: str = "text"
    domain_feature: str = "domain"
    input_length: int = field(512, at_least=3)
    noise_density: float = 0.15
    mean_span: float = field(3.0, at_least=1)

    def validate(self) -> None:
        """See `CorpusData`."""
        super().validate()
        if not 0 < self.noise_density <= 0.5:
            raise UserError(
                f"data.noise_density is {self.noise_density}; it must be above 0 and at most 0.5."
            )
        spans = self.lengths.spans
        if self.tokenizer.extra_ids < spans:
            raise UserError(
                f"data.tokenizer.extra_ids is {self.tokenizer.extra_ids}, but the {spans} spans of "
                f"data.input_length={self.input_length} need a sentinel each; raise it to {spans}."
            )

    @property
    def lengths(self) -> SpanLengths:
        """The lengths of a row."""
        return lengths_of_inputs(self.input_length, self.noise_density, self.mean_span)

    @property
    def target_length(self) -> int:
        """N."""
        return self.lengths.targets

    @property
    def tokens_per_row(self) -> int:
        """M + N."""
        return self.lengths.inputs + self.lengths.targets

    @property
    def row_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """See `DataConfig`."""
        return {
            "inputs": jax.ShapeDtypeStruct((self.lengths.inputs,), np.int32),
            "targets": jax.ShapeDtypeStruct((self.lengths.targets + 1,), np.int32),
        }

    def open(self, seed: int) -> "SpanCorruptionPipeline":
        """Opens, and if necessary prepares, tokenises and packs, the training split."""
        return SpanCorruptionPipeline(self, seed)

    def reopen(self, seed: int, workdir: epath.PathLike) -> "SpanCorruptionPipeline":
        """With the run's own tokenizer, which need not be learned again."""
        return SpanCorruptionPipeline(self, seed, self.tokenizer.load(workdir))


class SpanCorruptionPipeline(Pipeline):
    """Rows of text in training order, corrupted anew in every step; reading is thread-safe.

    Rows are `inputs`, int32 [M], and `targets`, int32 [N + 1], which begins with BOS; both end with
    EOS. The spans are a function of seed, step and row; those of held-out rows are always the same.
    """

    tokenizer: Tokenizer

    def __init__(
        self, config: SpanCorruptionData, seed: int, tokenizer: Tokenizer | None = None
    ) -> None:
        """Opens, and if necessary prepares, tokenises and packs, the training split.

        Args:
          config: what to read.
          seed: determines the training order and the spans; any integer from 0.
          tokenizer: of a run that has begun; None to learn it or find it learned.

        Raises:
          UserError: the dataset or one of its domains does not exist or is damaged, or no domain
            has a whole row.
        """
        config.validate()
        self._seed, self._lengths = seed, config.lengths
        shared = {
            field.name: getattr(config, field.name) for field in dataclasses.fields(CorpusData)
        }
        # Rows of the text share their last token with the next row: each is read without it.
        text = TextData(
            **shared,
            text_feature=config.text_feature,
            domain_feature=config.domain_feature,
            sequence_length=self._lengths.raw,
        )
        self._text = TextPipeline(text, seed, tokenizer)
        self.domains, self.sha256 = self._text.domains, self._text.sha256
        self.tokenizer = self._text.tokenizer
        self._sentinels = self._text.tokenizer.sentinels

    def rows(self, step: int, start: int, stop: int) -> dict[str, np.ndarray]:
        """See `Pipeline`."""
        # Another stream of numbers than the held-out rows', whose first number is 0.
        keys = [(1, self._seed, step, row) for row in range(start, stop)]
        return self._corrupted(self._text.rows(step, start, stop), keys)

    def held_out_batches(self, split: str, num_batches: int) -> list[dict[str, np.ndarray]]:
        """See `Pipeline`."""
        batches = []
        for number, batch in enumerate(self._text.held_out_batches(split, num_batches)):
            keys = [(0, number, row) for row in range(len(batch["mask"]))]
            corrupted = self._corrupted(batch, keys)
            for name in ("inputs", "targets"):
                corrupted[name][~batch["mask"]] = Tokenizer.PAD
            batches.append(corrupted)
        return batches

    def record(self) -> dict[str, Any]:
        """See `Pipeline`; `train_tokens` are raw."""
        return {**self._text.record(), "trivial_loss": self._trivial_loss()}

    def _corrupted(
        self, batch: Mapping[str, np.ndarray], keys: Sequence[tuple[int, ...]]
    ) -> dict[str, np.ndarray]:
        """Replaces `tokens` [B, R + 1] of a batch by `inputs` and `targets`, with a key per row."""
        rows = []
        for tokens, key in zip(batch["tokens"][:, :-1], keys, strict=True):
            mask = noise_mask(self._lengths, np.random.default_rng(key))
            rows.append(corrupt(tokens, mask, self._sentinels, self.tokenizer.EOS))
        inputs, targets = (np.stack(column) for column in zip(*rows, strict=True))
        begin = np.full((len(targets), 1), self.tokenizer.BOS, np.int32)
        others = {name: value for name, value in batch.items() if name != "tokens"}
        return {"inputs": inputs, "targets": np.concatenate([begin, targets], axis=1), **others}

    def _trivial_loss(self) -> float:
        """The entropy of a target's expected tokens: the text's, the sentinels once each, EOS."""
        counts = self._text.train.unigram_counts()
        text = counts / counts.sum() * self._lengths.noise
        text[self.tokenizer.EOS] += 1
        return entropy(np.concatenate([text, np.ones(self._lengths.spans)]))
