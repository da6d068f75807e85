"""The order in which rows are trained on, and the rows that are held out.

Axis letters: B batch (global rows of a step).

There is no iterator whose state must be saved: a run continues from its step number, on any number
of processes, each of which reads only its own rows.
"""

import abc
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epy

from moe_jax.data.interface import Pipeline
from moe_jax.errors import UserError

with epy.lazy_imports():
    import grain

Row = Mapping[str, np.ndarray]
Split = Mapping[str, Sequence[Row]]
"""Domain -> its rows, which all have the same arrays of the same shapes and types."""


class RowPipeline(Pipeline):
    """Rows of several domains in training order, and held-out batches.

    Attributes:
      rows_per_epoch: training rows in all domains.
    """

    def __init__(
        self,
        dataset: str,
        train: Split,
        batch_size: int,
        seed: int,
        domain_weights: Mapping[str, float],
        row: str = "row",
    ) -> None:
        """Orders the training rows.

        Args:
          dataset: what errors call the dataset.
          train: the training split.
          batch_size: B.
          seed: determines the training order; any integer from 0.
          domain_weights: shares of the training rows, of any sum; a domain left out is not
            trained on. Empty: every row once per epoch.
          row: what errors call a row.

        Raises:
          UserError: no domain has a row, or a weight is of no domain with a row.
        """
        self._dataset, self._batch_size, self._row = dataset, batch_size, row
        self.domains = tuple(sorted(train))
        self._train = [train[domain] for domain in self.domains]
        lengths = [len(rows) for rows in self._train]
        self._starts = np.array([0, *itertools.accumulate(lengths)])
        self.rows_per_epoch = int(self._starts[-1])
        if not self.rows_per_epoch:
            raise UserError(
                f"the training split of dataset={dataset!r} has no {row}; it needs one at least."
            )
        self._order = self._training_order(domain_weights, seed)

    @abc.abstractmethod
    def open_split(self, split: str) -> Split:
        """Opens another split.

        Raises:
          UserError: there is none of that name, or it is damaged.
        """

    def rows(self, step: int, start: int, stop: int) -> dict[str, np.ndarray]:
        """See `Pipeline`."""
        first = step * self._batch_size
        numbers = np.array([self._order[first + row] for row in range(start, stop)], np.int64)
        domain = np.searchsorted(self._starts, numbers, side="right") - 1
        chosen = [
            self._train[d][n] for d, n in zip(domain, numbers - self._starts[domain], strict=True)
        ]
        arrays = {name: np.stack([row[name] for row in chosen]) for name in chosen[0]}
        return {**arrays, "domain": domain.astype(np.int32)}

    def held_out_batches(self, split: str, num_batches: int) -> list[dict[str, np.ndarray]]:
        """See `Pipeline`.

        Domains get equal numbers of rows, or all of theirs where that is fewer, so that the loss of
        a small domain is as exact as that of a large one; within a domain the rows are evenly
        spaced. Rows of all domains are spread over the batches.

        Raises:
          UserError: the split does not exist, has no row, or has a domain that the training split
            lacks.
        """
        held_out = self.open_split(split)
        unknown = sorted(set(held_out) - set(self.domains))
        if unknown:
            raise UserError(
                f"split={split!r} of dataset={self._dataset!r} has the domain {unknown[0]!r}, which "
                "the training split lacks."
            )
        lengths = [len(held_out[domain]) if domain in held_out else 0 for domain in self.domains]
        chosen = _spread_rows(lengths, num_batches * self._batch_size)
        if not chosen:
            raise UserError(
                f"split={split!r} of dataset={self._dataset!r} has no {self._row}; it needs one at "
                "least."
            )
        return [
            self._held_out_batch(held_out, chosen[start : start + self._batch_size])
            for start in range(0, len(chosen), self._batch_size)
        ]

    def _held_out_batch(
        self, held_out: Split, chosen: Sequence[tuple[int, int]]
    ) -> dict[str, np.ndarray]:
        """A batch of (domain, row) pairs, filled up with zeros (PAD)."""
        rows = [held_out[self.domains[domain]][row] for domain, row in chosen]
        batch = {
            name: np.zeros((self._batch_size, *value.shape), value.dtype)
            for name, value in rows[0].items()
        }
        batch["domain"] = np.zeros(self._batch_size, np.int32)
        for place, ((domain, _), row) in enumerate(zip(chosen, rows, strict=True)):
            batch["domain"][place] = domain
            for name, value in row.items():
                batch[name][place] = value
        batch["mask"] = np.arange(self._batch_size) < len(chosen)
        return batch

    def _training_order(self, weights: Mapping[str, float], seed: int) -> "grain.MapDataset[int]":
        """An endless sequence of row numbers, counted over the domains in order.

        Rows are shuffled again in every epoch: of the corpus, or of a domain under weights.
        """
        if not weights:
            return _shuffled(0, self.rows_per_epoch, seed)
        for domain in weights:
            if domain not in self.domains or not len(self._train[self.domains.index(domain)]):
                raise UserError(
                    f"domain_weights names {domain!r}, which is not a domain with a {self._row} in "
                    f"dataset={self._dataset!r}; its domains are {', '.join(self.domains)}."
                )
        # Sorted, so that the order in which a config lists the domains does not matter.
        used = [self.domains.index(domain) for domain in sorted(weights)]
        return grain.MapDataset.mix(
            [_shuffled(int(self._starts[d]), int(self._starts[d + 1]), seed) for d in used],
            [weights[self.domains[d]] for d in used],
        )


def _shuffled(start: int, stop: int, seed: int) -> "grain.MapDataset[int]":
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
