"""A dataset as streams of tokens on disk, one per domain, cut into rows of equal length.

Axis letters: L sequence length.

The examples of a domain are tokenised once, and each ends with EOS in one stream. Row i is tokens
`i*L` to `i*L + L` of its stream, both included: neighbours share a token, so that with inputs
`row[:-1]` and targets `row[1:]` every token but the first is predicted once. The stream does not
depend on L, so every sequence length uses the same files.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

import numpy as np
import tqdm
from etils import epy

from moe_jax.data.remembered import remembered
from moe_jax.data.sources import OpenedDataset
from moe_jax.data.tokenizers import Tokenizer, utf8
from moe_jax.errors import UserError

with epy.lazy_imports():
    import tensorflow_datasets as tfds

_INDEX = "index.json"
_FORMAT = 3  # Of the files; text packed in another format is packed anew.


@dataclasses.dataclass(frozen=True)
class _Stream:
    """An entry of the index."""

    file: str
    tokens: int
    text_bytes: int
    sha256: str


class TokenStreams(Mapping[str, np.ndarray]):
    """The tokens of every domain, sorted by domain: domain -> [tokens], memory-mapped.

    EOS ends every text. Tokens are uint16, or uint32 where the vocabulary has more than 65,536.

    Attributes:
      sha256: of all domains' names and tokens, as hexadecimal digits.
      text_ids: of the tokenizer: all tokens are below.
      bytes_per_token: bytes of text (UTF-8) for each token of the streams, EOS included.
    """

    def __init__(self, directory: pathlib.Path) -> None:
        """Opens packed streams.

        Args:
          directory: what `pack` returned.

        Raises:
          UserError: a file is missing or has the wrong size.
        """
        try:
            index = json.loads((directory / _INDEX).read_text())
        except (OSError, ValueError) as error:
            raise _damaged(directory, f"{_INDEX} cannot be read") from error
        streams = {domain: _Stream(**entry) for domain, entry in index["streams"].items()}
        self.sha256: str = index["sha256"]
        self.text_ids: int = index["text_ids"]
        dtype = np.dtype(index["identity"]["dtype"])
        self._tokens = {
            domain: _open_stream(directory, stream, dtype) for domain, stream in streams.items()
        }
        total = sum(stream.tokens for stream in streams.values())
        self.bytes_per_token = sum(stream.text_bytes for stream in streams.values()) / max(total, 1)

    def __getitem__(self, domain: str) -> np.ndarray:
        return self._tokens[domain]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tokens)

    def __len__(self) -> int:
        return len(self._tokens)


class PackedText(Mapping[str, np.ndarray]):
    """The rows of every domain, sorted by domain: domain -> [rows, L + 1], memory-mapped.

    Attributes:
      streams: what the rows are cut from.
      sha256: of the streams.
      num_tokens: tokens that the rows predict, over all domains.
      dropped_tokens: tokens at the ends of streams that fill no row.
    """

    def __init__(self, directory: pathlib.Path, sequence_length: int) -> None:
        """Opens packed streams.

        Args:
          directory: what `pack` returned.
          sequence_length: L, tokens to predict in a row.

        Raises:
          UserError: a file is missing or has the wrong size.
        """
        self._directory, self._sequence_length = directory, sequence_length
        self.streams = TokenStreams(directory)
        self.sha256 = self.streams.sha256
        self._rows: dict[str, np.ndarray] = {}
        self.dropped_tokens = 0
        for domain, tokens in self.streams.items():
            num_rows = (len(tokens) - 1) // sequence_length
            if num_rows:
                windows = np.lib.stride_tricks.sliding_window_view(tokens, sequence_length + 1)
                self._rows[domain] = windows[::sequence_length]
            else:
                self._rows[domain] = np.empty((0, sequence_length + 1), tokens.dtype)
            self.dropped_tokens += len(tokens) - num_rows * sequence_length - 1
        self.num_tokens = sum(rows[:, 1:].size for rows in self._rows.values())

    def __getitem__(self, domain: str) -> np.ndarray:
        return self._rows[domain]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def unigram_counts(self) -> np.ndarray:
        """How often each token is a target: int64 [text_ids], without the extra ones."""
        counts = np.zeros(self.streams.text_ids, np.int64)
        for rows in self._rows.values():
            # bincount makes 8-byte integers of its argument: 4096 rows at a time.
            for start in range(0, len(rows), 4096):
                counts += np.bincount(rows[start : start + 4096, 1:].ravel(), minlength=len(counts))
        return counts

    def unigram_entropy(self) -> float:
        """`entropy` of the targets, counted once and kept beside the streams."""
        path = self._directory / f"entropy_{self._sequence_length}.json"
        of = {"sha256": self.sha256, "sequence_length": self._sequence_length}
        return remembered(path, of, lambda: entropy(self.unigram_counts()))


def entropy(counts: np.ndarray) -> float:
    """The entropy of a distribution in nats, from any multiples of the probabilities.

    No model that ignores the context has a lower loss on targets with these counts.
    """
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def texts(dataset: OpenedDataset, text_features: Sequence[str]) -> Iterator[str]:
    """The texts of every example, in order.

    Raises:
      UserError: a feature is missing, a text is not UTF-8, or a record cannot be read.
    """
    _check_features(dataset, text_features, "")
    for number, example in enumerate(dataset):
        where = f"example {number} of {dataset.name!r} {dataset.split}"
        for feature in text_features:
            yield utf8(_as_bytes(example[feature]), where)


def identity(dataset: OpenedDataset) -> dict[str, Any]:
    """What tells this split of this dataset from others, JSON-ready."""
    return {
        "dataset": dataset.name,
        "split": dataset.split,
        "examples": len(dataset.examples),
        "files": dict(dataset.file_sha256),
    }


def pack(
    dataset: OpenedDataset,
    tokenizer: Tokenizer,
    text_features: Sequence[str],
    domain_feature: str,
    cache: pathlib.Path,
) -> pathlib.Path:
    """Tokenises `dataset` into `cache`, unless that was done before, and returns the folder.

    The folder's name is a hash of the dataset's name, split and files, of the features and of the
    tokenizer. It appears by one rename when it is complete, so that processes may pack at once.

    Args:
      dataset: an opened split.
      tokenizer: turns each example's text into tokens.
      text_features: the features that hold text. BOS stands between the texts of an example.
      domain_feature: the feature that labels it, of strings or classes; empty for one domain
        named after the dataset.
      cache: the folder for packed text.

    Raises:
      UserError: a feature is missing, a text is not UTF-8, a record cannot be read, or `cache`
        cannot be written.
    """
    _check_features(dataset, text_features, domain_feature)
    packed_as = {
        "format": _FORMAT,
        **identity(dataset),
        "text_features": list(text_features),
        "domain_feature": domain_feature,
        "tokenizer": tokenizer.name,
        "dtype": tokenizer.dtype.str,
    }
    digest = hashlib.sha256(json.dumps(packed_as, sort_keys=True).encode()).hexdigest()
    packed = cache / digest[:16]
    if packed.exists():
        return packed
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, ignore_cleanup_errors=True) as temporary:
            folder = pathlib.Path(temporary)
            streams = _write_streams(dataset, tokenizer, text_features, domain_feature, folder)
            index = {
                "identity": packed_as,
                "text_ids": tokenizer.text_ids,
                "sha256": _total_sha256(streams),
                "streams": {name: dataclasses.asdict(entry) for name, entry in streams.items()},
            }
            (folder / _INDEX).write_text(json.dumps(index, indent=1))
            _rename_unless_there(folder, packed)
    except OSError as error:
        raise UserError(
            f"packed text of {dataset.name!r} cannot be written to {str(cache)!r} "
            f"({error.strerror}); choose a data_dir with room that you may write to."
        ) from error
    return packed


def _check_features(
    dataset: OpenedDataset, text_features: Sequence[str], domain_feature: str
) -> None:
    fields = [("text_feature", feature) for feature in text_features]
    for field, feature in (*fields, ("domain_feature", domain_feature)):
        if feature not in dataset.features and (feature or field == "text_feature"):
            hint = ", or the empty string for one domain" if field == "domain_feature" else ""
            raise UserError(
                f"{field}={feature!r} is not a feature of {dataset.name!r}, which has "
                f"{', '.join(dataset.features)}; name one of them{hint}."
            )
    for feature in text_features:
        if not isinstance(dataset.features[feature], tfds.features.Text):
            texts = [n for n, f in dataset.features.items() if isinstance(f, tfds.features.Text)]
            instead = f"name one of {', '.join(texts)}" if texts else "choose a dataset of text"
            raise UserError(
                f"text_feature={feature!r} of {dataset.name!r} does not hold text; {instead}."
            )


def _write_streams(
    dataset: OpenedDataset,
    tokenizer: Tokenizer,
    text_features: Sequence[str],
    domain_feature: str,
    folder: pathlib.Path,
) -> dict[str, _Stream]:
    """Writes a file of tokens per domain; returns the index entries, sorted by domain."""
    dtype = tokenizer.dtype
    end, between = (np.array([token], dtype).tobytes() for token in (tokenizer.EOS, tokenizer.BOS))
    lengths: collections.Counter[str] = collections.Counter()
    text_bytes: collections.Counter[str] = collections.Counter()
    digests: dict[str, Any] = {}
    files: dict[str, IO[bytes]] = {}
    title = f"Packing {dataset.name} {dataset.split}"
    with contextlib.ExitStack() as stack:
        # A bar only for a corpus that takes longer than 2 s.
        progress = tqdm.tqdm(dataset, title, len(dataset.examples), unit="example", delay=2)
        for number, example in enumerate(progress):
            domain = _domain(dataset, example, domain_feature)
            where = f"example {number} (domain {domain!r}) of {dataset.name!r} {dataset.split}"
            parts = [_as_bytes(example[feature]) for feature in text_features]
            content = between.join(tokenizer.encode(part, where).tobytes() for part in parts) + end
            if domain not in files:
                # Numbered, because a domain's name need not be a file's.
                path = folder / f"stream_{len(files):05d}.{dtype.name}"
                files[domain] = stack.enter_context(path.open("wb"))
                digests[domain] = hashlib.sha256()
            files[domain].write(content)
            digests[domain].update(content)
            lengths[domain] += len(content) // dtype.itemsize
            text_bytes[domain] += sum(
                len(part if isinstance(part, bytes) else part.encode()) for part in parts
            )
    return {
        domain: _Stream(
            pathlib.Path(files[domain].name).name,
            lengths[domain],
            text_bytes[domain],
            digests[domain].hexdigest(),
        )
        for domain in sorted(files)
    }


def _as_bytes(text: str | bytes) -> str | bytes:
    """TFDS returns bytes from files and strings from its mocks; neither may be a NumPy scalar."""
    return text if isinstance(text, str) else bytes(text)


def _domain(dataset: OpenedDataset, example: Mapping[str, Any], feature: str) -> str:
    if not feature:
        return dataset.name.partition("/")[0]
    label = example[feature]
    if isinstance(dataset.features[feature], tfds.features.ClassLabel):
        return dataset.features[feature].int2str(int(label))
    return label.decode() if isinstance(label, bytes) else str(label)


def _total_sha256(streams: Mapping[str, _Stream]) -> str:
    listing = json.dumps([[domain, streams[domain].sha256] for domain in sorted(streams)])
    return hashlib.sha256(listing.encode()).hexdigest()


def _rename_unless_there(folder: pathlib.Path, packed: pathlib.Path) -> None:
    folder.chmod(0o755)  # Temporary folders are private; the cache may be shared.
    try:
        os.rename(folder, packed)
    except OSError:
        if not packed.exists():  # Otherwise another process has packed the same text.
            raise


def _open_stream(directory: pathlib.Path, stream: _Stream, dtype: np.dtype) -> np.ndarray:
    path = directory / stream.file
    if not path.exists() or path.stat().st_size != stream.tokens * dtype.itemsize:
        raise _damaged(directory, f"{stream.file} does not hold {stream.tokens} tokens")
    return np.memmap(path, dtype, mode="r")


def _damaged(directory: pathlib.Path, reason: str) -> UserError:
    return UserError(
        f"the packed text in {str(directory)!r} is damaged ({reason}); delete that folder and it "
        "is made again."
    )
