"""A dataset of one's own: sums and differences of small numbers, in words."""

import pathlib
from typing import Any

from moe_jax.data.builders.labelled_text import Document, LabelledTextBuilder

WORDS = (
    *("zero", "one", "two", "three", "four", "five", "six"),
    *("seven", "eight", "nine", "ten", "eleven", "twelve"),
)


class Arithmetic(LabelledTextBuilder):
    """`config.data.dataset = "arithmetic"`, with the operations as its domains."""

    BLOCK_BYTES = 500
    SUMMARY = "Sums and differences of numbers up to twelve, in words."
    PREPARED_ON_FIRST_USE = True  # Nothing is downloaded.

    def collect(self, downloads: pathlib.Path) -> tuple[list[Document], dict[str, Any]]:
        """Documents of one number each: 'four plus three is seven.' and so on."""
        documents = []
        for repeat in range(20):
            for a in range(len(WORDS)):
                sums = [_sentence(a, "plus", b, a + b) for b in range(len(WORDS) - a)]
                differences = [_sentence(a, "minus", b, a - b) for b in range(a + 1)]
                documents.append(Document("plus", f"plus {a} {repeat}", "\n".join(sums)))
                documents.append(Document("minus", f"minus {a} {repeat}", "\n".join(differences)))
        return documents, {}


def _sentence(a: int, operation: str, b: int, result: int) -> str:
    return f"{WORDS[a]} {operation} {WORDS[b]} is {WORDS[result]}."
