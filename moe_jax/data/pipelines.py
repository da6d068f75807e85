"""The order in which rows of text are trained on, and the rows that are held out.

Axis letters: B batch (global rows of a step), L sequence length.

The global batch is a pure function of (seed, step). There is no iterator whose state must be
saved: a run continues from its step number, on any number of processes, each of which reads only
its own rows.
"""

import dataclasses
import itertools
import math

import grain
import numpy as np

from moe_jax.data.packing import PackedText, pack
from moe_jax.data.sources import open_dataset
from moe_jax.data.tokenizers import ByteTokenizer
from moe_jax.errors import UserError


@dataclasses.dataclass
class TextData:
    """Which text a run reads, in which proportions and row sizes."""

    dataset: str = "python_library"
    """A name or a directory: see `moe_jax.data.sources.open_dataset`."""
    data_dir: str = ""
    """Where datasets are found by name; empty for $TFDS_DATA_DIR or ~/tensorflow_datasets."""
    text_feature: str = "text"
    domain_feature: str = "domain"
    """The feature that labels the text; empty for one domain named after the dataset."""
    train_split: str = "train"
    """The split, or a TFDS slice of one such as `train[:99%]`, that is trained on."""
    held_out_split: str = "validation"
    """The split or slice that is evaluated during training; lm1b, for one, calls it `test`."""
    domain_weights: dict[str, float] = dataclasses.field(default_factory=dict)
    """Shares of the training rows, of any sum; a domain left out is not trained on. Empty: every
    row once per epoch, so that domains appear in proportion to their size."""
    sequence_length: int = 256
    """L: tokens predicted in a row."""
    batch_size: int = 64
    """B: rows of a step over all processes."""

    def validate(self) -> None:
        """Checks what can be checked without the dataset.

        Raises:
            UserError: A field has a value that no dataset makes right.
        """
        for field in ("sequence_length", "batch_size"):
            if getattr(self, field) < 1:
                raise UserError(f"data.{field} is {getattr(self, field)}; it must be at least 1.")
        for domain, weight in self.domain_weights.items():
            if not (math.isfinite(weight) and weight > 0):
                raise UserError(
                    f"data.domain_weights[{domain!r}] is {weight}; it must be a positive number; "
                    "leave a domain out to train without it."
                )


class TextPipeline:
    """Rows of a packed dataset in training order, and held-out batches.

    Reading is thread-safe.

    Attributes:
        domains: Names of the domains, sorted; the `domain` of a row is an index into them.
        train: The packed training split, with its `sha256` and `unigram_entropy()`.
        rows_per_epoch: Training rows in all domains.
    """

    def __init__(self, config: TextData, seed: int) -> None:
        """Opens, and if necessary prepares and packs, the training split.

        Args:
            config: What to read.
            seed: Determines the training order; any integer from 0.

        Raises:
            UserError: The dataset or one of its domains does not exist or is damaged, or no domain
                has a whole row.
        """
        config.validate()
        self._config = config
        self.train = self._open(config.train_split)
        self.domains = tuple(self.train)
        lengths = [len(self.train[domain]) for domain in self.domains]
        self._starts = np.array([0, *itertools.accumulate(lengths)])
        self.rows_per_epoch = int(self._starts[-1])
        if not self.rows_per_epoch:
            raise UserError(
                f"sequence_length={config.sequence_length} is longer than the text of every domain "
                f"of dataset={config.dataset!r}; a shorter one is needed."
            )
        self._order = self._training_order(seed)

    def rows(self, step: int, start: int, stop: int) -> dict[str, np.ndarray]:
        """Returns rows `start` to `stop` (excluded) of the global batch of `step`.

        Returns:
            `tokens`, int32 [stop - start, L + 1]: inputs `[:, :-1]`, targets `[:, 1:]`; and
            `domain`, int32 [stop - start].
        """
        first = step * self._config.batch_size
        numbers = np.array([self._order[first + row] for row in range(start, stop)], np.int64)
        domain = np.searchsorted(self._starts, numbers, side="right") - 1
        tokens = [
            self.train[self.domains[d]][n]
            for d, n in zip(domain, numbers - self._starts[domain], strict=True)
        ]
        return {"tokens": np.stack(tokens).astype(np.int32), "domain": domain.astype(np.int32)}

    def held_out_batches(self, split: str, num_batches: int) -> list[dict[str, np.ndarray]]:
        """Returns the same batches of `split` on every call.

        Domains get equal numbers of rows, or all of theirs where that is fewer, so that the loss of
        a small domain is as exact as that of a large one; within a domain the rows are evenly
        spaced. Rows of all domains are spread over the batches.

        Args:
            split: Name of a split.
            num_batches: At most so many batches; fewer when the split has fewer rows.

        Returns:
            Dictionaries of `tokens`, int32 [B, L + 1]; `domain`, int32 [B]; and `mask`, bool [B],
            False for the rows of PAD that fill up the last batch.

        Raises:
            UserError: The split does not exist, has no whole row, or has a domain that the training
                split lacks.
        """
        held_out = self._open(split)
        unknown = sorted(set(held_out) - set(self.domains))
        if unknown:
            raise UserError(
                f"split={split!r} of dataset={self._config.dataset!r} has the domain "
                f"{unknown[0]!r}, which the training split lacks."
            )
        batch_size, row_length = self._config.batch_size, self._config.sequence_length + 1
        lengths = [len(held_out[domain]) if domain in held_out else 0 for domain in self.domains]
        chosen = _spread_rows(lengths, num_batches * batch_size)
        if not chosen:
            raise UserError(
                f"split={split!r} of dataset={self._config.dataset!r} has no row of "
                f"sequence_length={self._config.sequence_length}; a shorter one is needed."
            )
        batches = []
        for start in range(0, len(chosen), batch_size):
            tokens = np.full((batch_size, row_length), ByteTokenizer.PAD, np.int32)
            domains = np.zeros(batch_size, np.int32)
            mask = np.zeros(batch_size, bool)
            for slot, (domain, row) in enumerate(chosen[start : start + batch_size]):
                tokens[slot] = held_out[self.domains[domain]][row]
                domains[slot] = domain
                mask[slot] = True
            batches.append({"tokens": tokens, "domain": domains, "mask": mask})
        return batches

    def _open(self, split: str) -> PackedText:
        config = self._config
        dataset = open_dataset(config.dataset, config.data_dir, split)
        packed = pack(
            dataset,
            ByteTokenizer(),
            config.text_feature,
            config.domain_feature,
            dataset.directory / "packed",
        )
        return PackedText(packed, config.sequence_length)

    def _training_order(self, seed: int) -> grain.MapDataset[int]:
        """An endless sequence of row numbers, counted over the domains in order.

        Rows are shuffled again in every epoch: of the corpus, or of a domain under weights.
        """
        weights = self._config.domain_weights
        if not weights:
            return _shuffled(0, self.rows_per_epoch, seed)
        for domain in weights:
            if domain not in self.domains or not len(self.train[domain]):
                raise UserError(
                    f"domain_weights names {domain!r}, which is not a domain with a row of "
                    f"sequence_length={self._config.sequence_length} in "
                    f"dataset={self._config.dataset!r}; its domains are {', '.join(self.domains)}."
                )
        # Sorted, so that the order in which a config lists the domains does not matter.
        used = [self.domains.index(domain) for domain in sorted(weights)]
        return grain.MapDataset.mix(
            [_shuffled(int(self._starts[d]), int(self._starts[d + 1]), seed) for d in used],
            [weights[self.domains[d]] for d in used],
        )


def _shuffled(start: int, stop: int, seed: int) -> grain.MapDataset[int]:
    """The numbers from `start` to `stop` in a new random order in every repetition."""
    # Grain's epoch e uses seed + e, so that neighbouring seeds, and domains of equal size, would
    # share permutations; hashed seeds are far apart.
    (far_apart,) = np.random.SeedSequence((seed, start)).generate_state(1)
    return grain.MapDataset.range(start, stop).shuffle(seed=int(far_apart)).repeat()


def _spread_rows(lengths: list[int], total: int) -> list[tuple[int, int]]:
    """Chooses at most `total` (domain, row) pairs from domains of `lengths` rows."""
    chosen: list[tuple[float, int, int]] = []
    left = total
    # From the smallest, so that what it lacks is shared by the others.
    for place, domain in enumerate(sorted(range(len(lengths)), key=lambda d: lengths[d])):
        share = min(lengths[domain], left // (len(lengths) - place))
        left -= share
        chosen += [((k + 0.5) / share, domain, k * lengths[domain] // share) for k in range(share)]
    return [(domain, row) for _, domain, row in sorted(chosen)]
