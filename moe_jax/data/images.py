"""Labelled images, each a row of its own.

Axis letters: B batch (global rows of a step), N images of a split.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, overload

import jax
import numpy as np
from etils import epy

from moe_jax.data.interface import DataConfig
from moe_jax.data.remembered import file_name, remembered
from moe_jax.data.rows import Row, RowPipeline
from moe_jax.data.sources import OpenedDataset, open_dataset
from moe_jax.errors import UserError

with epy.lazy_imports():
    import tensorflow_datasets as tfds
    from PIL import Image


@dataclasses.dataclass
class ImageData(DataConfig):
    """Which images a run reads, and at which size.

    Attributes:
      dataset: a name or a directory: see `moe_jax.data.sources.open_dataset`.
      data_dir: where datasets are found by name; empty for $TFDS_DATA_DIR or
        ~/tensorflow_datasets.
      domains_are_classes: evaluation and routing tell the classes apart, in place of one domain
        named after the dataset. Then held-out batches have equally many images of each.
      train_split: the split, or a TFDS slice of one such as `train[:99%]`, that is trained on.
      image_size: side of the square images that the model sees. Others are resized (bilinear) so
        that their shorter side fits, and cropped in the middle.
      channels: of the dataset's images: 1 for grey values, 3 for colors.
      num_classes: of the dataset's labels.
      shift: training images are moved by up to so many pixels along both sides; 0 fills the gap.
      flip: half of the training images are mirrored, left to right.
    """

    dataset: str = "mnist5k"
    data_dir: str = ""
    image_feature: str = "image"
    label_feature: str = "label"
    domains_are_classes: bool = False
    train_split: str = "train"
    image_size: int = 28
    channels: int = 1
    num_classes: int = 10
    shift: int = 0
    flip: bool = False

    @property
    def tokens_per_row(self) -> int:
        """1: the throughput counts images, whose patches are the model's business."""
        return 1

    @property
    def row_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """See `DataConfig`."""
        return {
            "image": jax.ShapeDtypeStruct(
                (self.image_size, self.image_size, self.channels), np.uint8
            ),
            "label": jax.ShapeDtypeStruct((), np.int32),
        }

    def validate(self) -> None:
        """Checks what can be checked without the dataset.

        Raises:
          UserError: a field has a value that no dataset makes right.
        """
        super().validate()
        for field in ("image_size", "channels", "num_classes"):
            if getattr(self, field) < 1:
                raise UserError(f"data.{field} is {getattr(self, field)}; it must be at least 1.")
        if not 0 <= self.shift < self.image_size:
            raise UserError(
                f"data.shift is {self.shift}; it must be at least 0 and below "
                f"data.image_size={self.image_size}."
            )

    def open(self, seed: int) -> "ImagePipeline":
        """See `DataConfig` and `ImagePipeline`."""
        return ImagePipeline(self, seed)


class LabelledImages(Sequence[Row]):
    """Some images of a dataset as rows: `image`, uint8 [H, W, channels], and `label`, int32 []."""

    def __init__(self, dataset: OpenedDataset, numbers: np.ndarray, config: ImageData) -> None:
        self._dataset, self._numbers, self._config = dataset, numbers, config

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...

    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        """One row, or those of a slice."""
        if isinstance(index, slice):
            return LabelledImages(self._dataset, self._numbers[index], self._config)
        example = self._dataset.example(int(self._numbers[index]))
        image = fitted(example[self._config.image_feature], self._config.image_size)
        return {"image": image, "label": np.array(example[self._config.label_feature], np.int32)}


class ImagePipeline(RowPipeline):
    """Images of a dataset in training order, and held-out batches.

    Beside `domain`, rows have `image`, uint8 [..., H, W, channels], and `label`, int32 [...].
    Reading is thread-safe.
    """

    def __init__(self, config: ImageData, seed: int) -> None:
        """Opens the training split.

        Args:
          config: what to read.
          seed: determines the training order and augmentation; any integer from 0.

        Raises:
          UserError: the dataset does not exist or is damaged, or is of other images or labels than
            `config` says.
        """
        config.validate()
        self._config, self._seed = config, seed
        train = open_dataset(config.dataset, config.data_dir, config.train_split)
        _check_features(train, config)
        labels = _labels(train, config)
        self.sha256 = _sha256(train)
        self._facts = {
            "name": train.name,
            "split": train.split,
            "sha256": self.sha256,
            "train_images": len(labels),
            "trivial_loss": _entropy(labels),
        }
        super().__init__(
            config.dataset,
            _by_domain(train, labels, config),
            config.batch_size,
            seed,
            domain_weights={},
            row="image",
        )

    def open_split(self, split: str) -> Mapping[str, Sequence[Row]]:
        """See `RowPipeline`."""
        config = self._config
        opened = open_dataset(config.dataset, config.data_dir, split)
        return _by_domain(opened, _labels(opened, config), config)

    def rows(self, step: int, start: int, stop: int) -> dict[str, np.ndarray]:
        """See `Pipeline`; the images are augmented."""
        rows = super().rows(step, start, stop)
        images = [
            self._augmented(image, np.random.default_rng((self._seed, step, start + number)))
            for number, image in enumerate(rows["image"])
        ]
        return {**rows, "image": np.stack(images)}

    def record(self) -> dict[str, Any]:
        """See `Pipeline`; `trivial_loss` is a softmax's: the entropy of the training labels."""
        return self._facts

    def _augmented(self, image: np.ndarray, random: np.random.Generator) -> np.ndarray:
        shift, size = self._config.shift, self._config.image_size
        if shift:
            padded = np.pad(image, ((shift, shift), (shift, shift), (0, 0)))
            top, left = random.integers(0, 2 * shift, 2, endpoint=True)
            image = padded[top : top + size, left : left + size]
        if self._config.flip and random.random() < 0.5:
            image = image[:, ::-1]
        return image


def fitted(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 [H, W, channels] as [size, size, channels]: resized to the shorter side, then cropped.

    Raises:
      UserError: the image has neither 1 nor 3 channels, and another size.
    """
    height, width, channels = image.shape
    if height == width == size:
        return image
    if channels not in (1, 3):
        raise UserError(
            f"data.image_size is {size}, but an image has {height} x {width} pixels of {channels} "
            "channels, and only those of 1 or 3 can be resized; prepare them at that size."
        )
    scale = size / min(height, width)
    new_height, new_width = (max(size, round(side * scale)) for side in (height, width))
    picture = Image.fromarray(image[:, :, 0] if channels == 1 else image)
    picture = picture.resize((new_width, new_height), Image.Resampling.BILINEAR)
    resized = np.asarray(picture).reshape(new_height, new_width, channels)
    top, left = (new_height - size) // 2, (new_width - size) // 2
    return resized[top : top + size, left : left + size]


def _check_features(dataset: OpenedDataset, config: ImageData) -> None:
    """Raises UserError where the dataset has not the images and labels that `config` says."""
    features = dataset.features
    kinds = {
        "image_feature": ("image", lambda feature: len(feature.shape or ()) == 3),
        "label_feature": (
            "class label",
            lambda feature: isinstance(feature, tfds.features.ClassLabel),
        ),
    }
    for field, (kind, is_kind) in kinds.items():
        name = getattr(config, field)
        if name not in features or not is_kind(features[name]):
            raise UserError(
                f"data.{field} is {name!r}, which is no {kind} of dataset={config.dataset!r}; its "
                f"features are {', '.join(sorted(features))}."
            )
    sizes = {
        "channels": features[config.image_feature].shape[-1],
        "num_classes": features[config.label_feature].num_classes,
    }
    for field, size in sizes.items():
        if getattr(config, field) != size:
            raise UserError(
                f"data.{field} is {getattr(config, field)}, but dataset={config.dataset!r} has "
                f"{size}; set data.{field} and model.{field} to that."
            )


def _labels(dataset: OpenedDataset, config: ImageData) -> np.ndarray:
    """[N] int64 labels, read without decoding the images, once for the same files.

    Raises:
      UserError: some are outside of [0, num_classes), or all are the same.
    """
    name = file_name("labels", dataset.split, config.label_feature)
    path = dataset.directory / "checked" / name
    of = {
        "split": dataset.split,
        "label_feature": config.label_feature,
        "files": dict(dataset.file_sha256),
    }
    read = remembered(path, of, lambda: _read_labels(dataset, config).tolist())
    labels = np.array(read, np.int64)
    _check_labels(labels, f"split={dataset.split!r} of dataset={config.dataset!r}", config)
    return labels


def _check_labels(labels: np.ndarray, where: str, config: ImageData) -> None:
    """Raises UserError where no classifier could learn or be measured by these labels.

    A softmax's loss of a label outside is 0, and a constant answer is always right for one class alone.
    """
    outside = labels[(labels < 0) | (labels >= config.num_classes)]
    if outside.size:
        unlabelled = ", -1 for unlabelled" if (outside == -1).all() else ""
        raise UserError(
            f"{where} has {outside.size} of {labels.size} labels outside 0 to {config.num_classes - 1} "
            f"(the first is {outside[0]}{unlabelled}); name a split that is labelled, or set "
            "data.num_classes to the dataset's."
        )
    if labels.size and config.num_classes > 1 and (labels == labels[0]).all():
        raise UserError(
            f"{where} has {labels.size} images, all of the class {labels[0]}, by which nothing is learned "
            "or measured; name a split with more classes."
        )


def _read_labels(dataset: OpenedDataset, config: ImageData) -> np.ndarray:
    skip = {config.image_feature: tfds.decode.SkipDecoding()}
    examples: Any = dataset.examples
    undecoded = dataclasses.replace(examples, decoders=skip)
    numbers = range(len(examples))
    # Many records at a time: one by one, those of 55,000 images take three times as long.
    parts = (undecoded.__getitems__(numbers[i : i + 4096]) for i in numbers[::4096])
    with dataset.reading():
        labels = [example[config.label_feature] for part in parts for example in part]
        return np.array(labels, np.int64)


def _by_domain(
    dataset: OpenedDataset, labels: np.ndarray, config: ImageData
) -> dict[str, LabelledImages]:
    """The images of each domain."""
    if not config.domains_are_classes:
        name = dataset.name.partition("/")[0]
        return {name: LabelledImages(dataset, np.arange(len(labels)), config)}
    names = dataset.features[config.label_feature].names
    return {
        name: LabelledImages(dataset, np.flatnonzero(labels == label), config)
        for label, name in enumerate(names)
    }


def _entropy(labels: np.ndarray) -> float:
    """Of the distribution of labels, in nats."""
    _, counts = np.unique(labels, return_counts=True)
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def _sha256(dataset: OpenedDataset) -> str:
    """Of the split's name and files, as hexadecimal digits."""
    digest = hashlib.sha256(dataset.split.encode())
    for file, checksum in sorted(dataset.file_sha256.items()):
        digest.update(f"\0{file}\0{checksum}".encode())
    return digest.hexdigest()
