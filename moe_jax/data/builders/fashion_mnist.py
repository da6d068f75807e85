"""70,000 photographs of clothes in 10 classes: Fashion-MNIST, from a Debian package.

Xiao, Rasul and Vollgraf 2017 (MIT licence); the package `dataset-fashion-mnist` carries the authors'
four files, 31 MB, which are downloaded with `apt-get download` and read without installing them.
"""

import gzip
import hashlib
import math
import pathlib
from typing import Any

import numpy as np

from moe_jax.data.builders.labelled_images import (
    ClassifiedImages,
    LabelledImagesBuilder,
    ranked_by_pixels,
)
from moe_jax.data.builders.packages import Packages, origin
from moe_jax.errors import UserError

PACKAGE = "dataset-fashion-mnist"
VALIDATION_PER_CLASS = 500
"""Of the authors' 6,000 training images of each class."""

# The sha256 of each file's content, which is the authors' in every version of the package.
SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
_FOLDER = "./usr/share/datasets/fashion-mnist"
_ALTERNATIVE = "dataset=mnist5k needs only pip"


def idx_array(content: bytes) -> np.ndarray:
    """The array of a file in MNIST's format: http://yann.lecun.com/exdb/mnist.

    Two zero bytes, the type (8 for uint8), the number of axes, their sizes as big-endian int32, and
    the values.

    Raises:
      ValueError: it is something else.
    """
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise ValueError("no IDX file of bytes")
    axes = content[3]
    shape = tuple(np.frombuffer(content, ">i4", axes, offset=4).tolist())
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * axes)
    if len(values) != math.prod(shape):
        raise ValueError(f"{len(values)} values for an array of {shape}")
    return values.reshape(shape)


# TFDS has a dataset of this name, too; registered twice, all of its image datasets were lost.
class FashionMnist(LabelledImagesBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Fashion-MNIST: 55,000 images to train on, 5,000 for validation, the authors' 10,000 for test.

    The validation images are those of the authors' training images whose pixels come first by
    sha256, 500 of each class.
    """

    SIDE = 28
    CLASSES = (
        "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
        "ankle boot",
    )  # fmt: skip
    SUMMARY = "Grey photographs of clothes, 28 x 28, in 10 classes."

    def collect(
        self, downloads: pathlib.Path
    ) -> tuple[dict[str, ClassifiedImages], dict[str, Any]]:
        """Downloads the package and reads its files.

        Raises:
          UserError: it cannot be downloaded, or its files are others than the authors'.
        """
        packages = Packages(self.name, _ALTERNATIVE, downloads)
        archives = packages.fetch([PACKAGE])
        arrays = {}
        with packages.open(archives[PACKAGE]) as opened:
            for member in opened:
                name = pathlib.PurePath(member.name).name.removesuffix(".gz")
                file = opened.extractfile(member) if name in SHA256 else None
                if file is not None:
                    content = gzip.decompress(file.read())
                    _verify(name, content)
                    arrays[name] = idx_array(content)
        if missing := SHA256.keys() - arrays.keys():
            raise UserError(
                f"dataset={self.name} could not be prepared, because {archives[PACKAGE].name} "
                f"lacks {', '.join(sorted(missing))}; {_ALTERNATIVE}."
            )
        train, test = (_classified(arrays, part) for part in ("train", "t10k"))
        ranked = ranked_by_pixels(train)
        held_out = sorted(i for indices in ranked for i in indices[:VALIDATION_PER_CLASS])
        rest = sorted(i for indices in ranked for i in indices[VALIDATION_PER_CLASS:])
        splits = {"train": train[rest], "validation": train[held_out], "test": test}
        return splits, origin(archives)


def _classified(arrays: dict[str, np.ndarray], part: str) -> ClassifiedImages:
    images, labels = arrays[f"{part}-images-idx3-ubyte"], arrays[f"{part}-labels-idx1-ubyte"]
    return ClassifiedImages(images[..., None], labels.astype(np.int64))


def _verify(name: str, content: bytes) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256[name]:
        raise UserError(
            f"the file {name} of the package {PACKAGE} has the sha256 {found}, not {SHA256[name]}; "
            "the package carries other images than Fashion-MNIST's authors published."
        )
