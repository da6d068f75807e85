"""What the image builders share: grey or coloured images of one size with a class each."""

import abc
import dataclasses
import hashlib
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds


@dataclasses.dataclass(frozen=True)
class ClassifiedImages:
    """Some images and their classes.

    Attributes:
      images: uint8 [N, side, side, 1], 0 for the background.
      labels: int64 [N].
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: Sequence[int] | np.ndarray) -> "ClassifiedImages":
        """Those at the indices."""
        return ClassifiedImages(self.images[indices], self.labels[indices])


def ranked_by_pixels(images: ClassifiedImages) -> list[list[int]]:
    """The indices of each class that occurs, in the order of the sha256 of their pixels.

    So an image's place in a split depends on nothing else in a file but how many share its class.
    """
    return [
        sorted(
            np.flatnonzero(images.labels == label).tolist(),
            key=lambda index: hashlib.sha256(images.images[index].tobytes()).digest(),
        )
        for label in np.unique(images.labels)
    ]


class LabelledImagesBuilder(tfds.core.GeneratorBasedBuilder, abc.ABC):
    """A TFDS builder of grey images with a class each.

    Features: `image`, uint8 [SIDE, SIDE, 1], and `label`, one of CLASSES. The dataset's metadata
    (`metadata.json`) holds `corpus_sha256` of all splits, the size of every class, and the packages.
    """

    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # No checksums of downloads beside the source file: see LabelledTextBuilder.
    SIDE: int
    CLASSES: tuple[str, ...]
    SUMMARY: str

    @abc.abstractmethod
    def collect(
        self, downloads: pathlib.Path
    ) -> tuple[Mapping[str, ClassifiedImages], dict[str, Any]]:
        """Returns the splits, and JSON-like facts about each package they come from.

        Args:
          downloads: a folder for downloaded files, kept between calls; it may not exist yet.
        """

    def _info(self) -> tfds.core.DatasetInfo:
        # Not tfds.features.Image, which needs TensorFlow to write.
        shape = (self.SIDE, self.SIDE, 1)
        image = tfds.features.Tensor(shape=shape, dtype=np.uint8, encoding="zlib")
        label = tfds.features.ClassLabel(names=self.CLASSES)
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.SUMMARY,
            features=tfds.features.FeaturesDict({"image": image, "label": label}),
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        splits, packages = self.collect(pathlib.Path(dl_manager.download_dir) / self.name)
        labels = np.concatenate([split.labels for split in splits.values()])
        counts = np.bincount(labels, minlength=len(self.CLASSES))
        sizes = {
            name: {"bytes": int(self.SIDE**2 * count), "documents": int(count)}
            for name, count in zip(self.CLASSES, counts, strict=True)
        }
        digest = corpus_sha256(splits)
        self.info.metadata.update({"corpus_sha256": digest, "domains": sizes, "packages": packages})
        return {name: self._generate_examples(split) for name, split in splits.items()}

    def _generate_examples(self, split: ClassifiedImages) -> Iterator[tuple[int, dict[str, Any]]]:
        for index, (image, label) in enumerate(zip(split.images, split.labels, strict=True)):
            yield index, {"image": image, "label": int(label)}


def corpus_sha256(splits: Mapping[str, ClassifiedImages]) -> str:
    """The sha256 over the splits' names, images and labels, in order, as hexadecimal digits."""
    digest = hashlib.sha256()
    for name, split in splits.items():
        digest.update(f"{name} {len(split)}\n".encode())
        digest.update(split.images.tobytes())
        digest.update(split.labels.tobytes())
    return digest.hexdigest()
