"""Formants of spoken English vowels, measured by Peterson and Barney (1952).

76 speakers (33 men, 28 women, 15 children) said ten vowels between h and d, twice each. The
pitch F0 and the first three formants of each are the table "Create formant table (Peterson &
Barney 1952)" of the program Praat (GPL-3), which the Python package `praat-parselmouth` carries.
"""

import collections
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from moe_jax.errors import UserError

VOWELS = {
    "iy": "heed", "ih": "hid", "eh": "head", "ae": "had", "ah": "hud",
    "aa": "hod", "ao": "hawed", "uh": "hood", "uw": "who'd", "er": "heard",
}  # fmt: skip
"""The vowel's code in the data, and the word that was said."""

GROUPS = {"m": "man", "w": "woman", "c": "child"}
FREQUENCIES = ("f0", "f1", "f2", "f3")
# Two thirds of each group: 50 and 25 speakers in all; one of the 28 women is in neither.
_SPEAKERS = {"man": (22, 11), "woman": (18, 9), "child": (10, 5)}
_COMMAND = "Create formant table (Peterson & Barney 1952)"


def praat_table() -> str:
    """The measurements as lines of tab-separated fields under a line of names.

    Raises:
      UserError: the package that carries them is not installed.
    """
    try:
        import parselmouth
    except ImportError as error:
        raise UserError(
            "dataset=peterson_barney is a table inside the package praat-parselmouth, which is not "
            "installed; install it with `make install EXTRA=vowels`."
        ) from error
    return parselmouth.praat.call(parselmouth.praat.call(_COMMAND), "List", False)


def utterances(table: str) -> list[dict[str, Any]]:
    """One dictionary for each line of `table` under its head, in order."""
    names, *lines = (line.split("\t") for line in table.splitlines())
    said: collections.Counter[tuple[str, str]] = collections.Counter()
    found = []
    for line in lines:
        fields = dict(zip((name.lower() for name in names), line, strict=True))
        speaker, vowel = fields["speaker"], fields["vowel"]
        found.append(
            {
                "speaker": int(speaker),
                "group": GROUPS[fields["type"]],
                "vowel": vowel,
                "repetition": said[speaker, vowel],
                **{name: float(fields[name]) for name in FREQUENCIES},
            }
        )
        said[speaker, vowel] += 1
    return found


def speakers_of_splits(examples: Sequence[dict[str, Any]]) -> dict[str, set[int]]:
    """50 speakers to train on and 25 to test on, men, women and children two to one in each.

    A speaker's place depends on the sha256 of the number alone.
    """
    group_of = {example["speaker"]: example["group"] for example in examples}
    splits: dict[str, set[int]] = {"train": set(), "test": set()}
    for group, (train, test) in _SPEAKERS.items():
        ranked = sorted(
            (speaker for speaker, its_group in group_of.items() if its_group == group),
            key=lambda speaker: hashlib.sha256(f"speaker {speaker}".encode()).digest(),
        )
        splits["train"] |= set(ranked[:train])
        splits["test"] |= set(ranked[train : train + test])
    return splits


class PetersonBarney(tfds.core.GeneratorBasedBuilder):
    """1,000 vowels of 50 speakers to train on, and 500 of 25 other speakers to test on.

    Features: `vowel`, a key of VOWELS; `f0` to `f3` in Hz; `speaker`, `group` (man, woman, child)
    and `repetition` (0 or 1). The dataset's metadata (`metadata.json`) holds `corpus_sha256` of the
    table and the number of utterances of every vowel.
    """

    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # No checksums of downloads beside the source file: see LabelledTextBuilder.

    def _info(self) -> tfds.core.DatasetInfo:
        scalar, text = tfds.features.Scalar, tfds.features.Text
        return tfds.core.DatasetInfo(
            builder=self,
            description="Formants of ten English vowels said twice by 76 speakers.",
            features=tfds.features.FeaturesDict(
                {
                    "speaker": scalar(np.int32),
                    "group": text(),
                    "vowel": text(),
                    "repetition": scalar(np.int32),
                    **{name: scalar(np.float32) for name in FREQUENCIES},
                }
            ),
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        table = praat_table()
        examples = utterances(table)
        counts = collections.Counter(example["vowel"] for example in examples)
        self.info.metadata.update(
            {
                "corpus_sha256": hashlib.sha256(table.encode()).hexdigest(),
                "domains": {
                    vowel: {
                        "bytes": 4 * len(FREQUENCIES) * counts[vowel],
                        "documents": counts[vowel],
                    }
                    for vowel in VOWELS
                },
                "packages": {"praat-parselmouth": {"table": _COMMAND}},
            }
        )
        return {
            split: self._generate_examples(examples, speakers)
            for split, speakers in speakers_of_splits(examples).items()
        }

    def _generate_examples(
        self, examples: Sequence[dict[str, Any]], speakers: set[int]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for index, example in enumerate(examples):
            if example["speaker"] in speakers:
                yield index, example
