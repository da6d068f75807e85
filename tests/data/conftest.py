"""A corpus of three small domains, prepared as array_record once per session."""

import pathlib

import pytest

from moe_jax.data.builders.labelled_text import Document, LabelledTextBuilder

WORDS = {"fruit": "apple pear plum ", "metal": "iron tin zinc ", "tree": "oak élm fir "}


class TinyText(LabelledTextBuilder):
    """Documents of known text: `fruit` has the most, `tree` the least."""

    BLOCK_BYTES = 400
    SUMMARY = "Three domains of repeated words."

    def collect(self, downloads: pathlib.Path):
        documents = [
            Document(domain, f"{number}.txt", f"{number}: {words * 20}\n\n")
            for size, (domain, words) in zip((60, 40, 20), WORDS.items(), strict=True)
            for number in range(size)
        ]
        return documents, {"origin": "the test"}


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory) -> pathlib.Path:
    """The directory of the prepared dataset. Tests that damage it work on a copy."""
    root = tmp_path_factory.mktemp("datasets")
    builder = TinyText(data_dir=str(root), file_format="array_record")
    builder.download_and_prepare()
    return pathlib.Path(builder.data_path)
