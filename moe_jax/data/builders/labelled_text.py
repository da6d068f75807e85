"""What the text builders share: documents with a domain become blocks in three splits."""

import abc
import collections
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import tensorflow_datasets as tfds

HELD_OUT_FRACTION = 0.05
"""Share of each domain's blocks in `validation`, and again in `test`."""


@dataclasses.dataclass(frozen=True)
class Document:
    """One text with the label of where it comes from.

    Attributes:
      name: unique within the domain, for example a path.
    """

    domain: str
    name: str
    text: str


@dataclasses.dataclass(frozen=True)
class TextBlock:
    """A piece of a document: one example of the dataset.

    Attributes:
      name: `document#index`.
    """

    domain: str
    name: str
    text: str

    @property
    def key(self) -> str:
        """Unique in the dataset."""
        return f"{self.domain}/{self.name}"


def split_text(text: str, block_bytes: int) -> Iterator[str]:
    """Cuts `text` into pieces whose concatenation is `text`.

    A piece ends at the first blank line after `block_bytes` bytes of UTF-8, or, in text that has
    no blank lines, at the first line end after twice that.
    """
    piece: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        piece.append(line)
        size += len(line.encode())
        if size >= 2 * block_bytes or (size >= block_bytes and not line.strip()):
            yield "".join(piece)
            piece, size = [], 0
    if piece:
        yield "".join(piece)


def assign_splits(blocks: Iterable[TextBlock]) -> dict[str, list[TextBlock]]:
    """Divides blocks into train, validation and test, about 90 / 5 / 5 in every domain.

    A block's place depends on the sha256 of its key. Ranking the blocks of a domain by that hash,
    rather than comparing it with a threshold, gives the smallest domain held-out text too: at a
    threshold of 5 %, a domain of 20 blocks would have none in a third of all corpora.

    Other blocks of a document may be in another split, so held-out loss measures new text from
    known documents, as the losses of two models on the same split are compared.
    """
    by_domain: dict[str, list[TextBlock]] = collections.defaultdict(list)
    for block in blocks:
        by_domain[block.domain].append(block)
    splits: dict[str, list[TextBlock]] = {"train": [], "validation": [], "test": []}
    for domain in sorted(by_domain):
        ranked = sorted(by_domain[domain], key=lambda b: hashlib.sha256(b.key.encode()).digest())
        held_out = max(1, round(HELD_OUT_FRACTION * len(ranked)))
        splits["validation"] += ranked[:held_out]
        splits["test"] += ranked[held_out : 2 * held_out]
        splits["train"] += ranked[2 * held_out :]
    return splits


def corpus_sha256(blocks: Iterable[TextBlock]) -> str:
    """The sha256 over every block's key and text, in order, as hexadecimal digits."""
    digest = hashlib.sha256()
    for block in blocks:
        for field in (block.key, block.text):
            encoded = field.encode()
            # The length first, so that moving text from one field to the next changes the digest.
            digest.update(len(encoded).to_bytes(8, "little"))
            digest.update(encoded)
    return digest.hexdigest()


def _domain_sizes(blocks: Iterable[TextBlock]) -> dict[str, dict[str, int]]:
    sizes: dict[str, dict[str, int]] = {}
    for block in blocks:
        size = sizes.setdefault(block.domain, {"bytes": 0, "documents": 0, "blocks": 0})
        size["bytes"] += len(block.text.encode())
        size["documents"] += block.name.endswith("#0")
        size["blocks"] += 1
    return sizes


class LabelledTextBuilder(tfds.core.GeneratorBasedBuilder, abc.ABC):
    """A TFDS builder of text with a domain label, whose examples are blocks of documents.

    Features: `text`, `domain` and `name`, all strings. The dataset's metadata (`metadata.json`)
    holds `corpus_sha256`, the size of every domain, and what `collect` says of the origin.
    """

    VERSION = tfds.core.Version("1.0.0")
    # TFDS would look beside the source file for checksums of downloads, of which it makes none
    # here, and needs importlib_resources for that, which it does not install.
    code_path = None
    BLOCK_BYTES: int
    SUMMARY: str

    @abc.abstractmethod
    def collect(self, downloads: pathlib.Path) -> tuple[Iterable[Document], dict[str, Any]]:
        """Returns the documents in a fixed order, and JSON-like facts about their origin.

        Args:
          downloads: a folder for downloaded files, kept between calls; it may not exist yet.
        """

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.SUMMARY,
            features=tfds.features.FeaturesDict({"text": text(), "domain": text(), "name": text()}),
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[str, dict[str, str]]]]:
        documents, origin = self.collect(pathlib.Path(dl_manager.download_dir) / self.name)
        blocks = [
            TextBlock(document.domain, f"{document.name}#{index}", text)
            for document in documents
            for index, text in enumerate(split_text(document.text, self.BLOCK_BYTES))
        ]
        facts = {"corpus_sha256": corpus_sha256(blocks), "domains": _domain_sizes(blocks), **origin}
        self.info.metadata.update(json.loads(json.dumps(facts)))
        return {
            split: self._generate_examples(chosen)
            for split, chosen in assign_splits(blocks).items()
        }

    def _generate_examples(self, blocks: list[TextBlock]) -> Iterator[tuple[str, dict[str, str]]]:
        for block in blocks:
            yield block.key, dataclasses.asdict(block)
