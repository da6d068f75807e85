"""Order, augmentation and refusals of labelled images, on a dataset of 23 known ones."""

import gzip
import hashlib
import math
import pathlib

import numpy as np
import pytest
import tensorflow_datasets as tfds

from moe_jax.data.builders.labelled_images import ClassifiedImages
from moe_jax.data.builders.mnist5k import read_digits, split_by_label
from moe_jax.data.images import ImageData, fitted
from moe_jax.errors import UserError
from tests.data.shapes import assert_batch_shapes

SIDE = 6


class TinyImages(tfds.core.GeneratorBasedBuilder):
    """Image n is all n + 1, of class `even` or `odd`; 12 of 23 are even."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None

    def _info(self):
        features = {
            "image": tfds.features.Tensor(shape=(SIDE, SIDE, 1), dtype=np.uint8, encoding="zlib"),
            "label": tfds.features.ClassLabel(names=("even", "odd")),
            "name": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples() for split in ("train", "validation")}

    def _generate_examples(self):
        for n in range(23):
            image = np.full((SIDE, SIDE, 1), n + 1, np.uint8)
            yield n, {"image": image, "label": n % 2, "name": str(n)}


@pytest.fixture(scope="module")
def tiny_images(tmp_path_factory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("datasets")
    builder = TinyImages(data_dir=str(root), file_format="array_record")
    builder.download_and_prepare()
    return pathlib.Path(builder.data_path)


class Labels(tfds.core.GeneratorBasedBuilder):
    """Splits of images whose labels are wrong in one way each."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None

    _info = TinyImages._info

    def _split_generators(self, dl_manager):
        splits = {"train": [0, 1, 0], "hidden": [-1, -1, -1], "partly": [0, -1, 1]}
        splits |= {"above": [0, 2, 1], "constant": [1, 1, 1]}
        return {split: self._generate_examples(labels) for split, labels in splits.items()}

    def _generate_examples(self, labels):
        for n, label in enumerate(labels):
            yield n, {"image": np.ones((SIDE, SIDE, 1), np.uint8), "label": label, "name": str(n)}


@pytest.fixture(scope="module")
def bad_labels(tmp_path_factory) -> pathlib.Path:
    with pytest.MonkeyPatch.context() as patch:  # TFDS itself writes no label above.
        patch.setattr(tfds.features.ClassLabel, "encode_example", lambda self, label: label)
        builder = Labels(
            data_dir=str(tmp_path_factory.mktemp("labels")), file_format="array_record"
        )
        builder.download_and_prepare()
    return pathlib.Path(builder.data_path)


@pytest.mark.parametrize(
    ("split", "words"),
    [
        ("hidden", "has 3 of 3 labels outside 0 to 1 (the first is -1, -1 for unlabelled)"),
        ("partly", "has 1 of 3 labels outside 0 to 1 (the first is -1, -1 for unlabelled)"),
        ("above", "has 1 of 3 labels outside 0 to 1 (the first is 2)"),
        ("constant", "has 3 images, all of the class 1, by which nothing is learned or measured"),
    ],
)
@pytest.mark.parametrize("by_class", [False, True])
def test_labels_by_which_nothing_can_be_measured_are_counted_and_refused(
    bad_labels, split, words, by_class
):
    data = config(bad_labels, domains_are_classes=by_class)
    with pytest.raises(UserError) as held_out:
        data.open(seed=0).held_out_batches(split, 1)
    data.train_split = split
    with pytest.raises(UserError) as training:
        data.open(seed=0)
    for error in (held_out, training):
        assert words in str(error.value) and f"split={split!r}" in str(error.value)


def config(directory, **fields) -> ImageData:
    sizes = {"image_size": SIDE, "num_classes": 2, "batch_size": 4}
    return ImageData(dataset=str(directory), **(sizes | fields))


def test_an_epoch_has_every_image_once_and_each_its_label(tiny_images):
    pipeline = config(tiny_images).open(seed=0)
    assert pipeline.domains == ("tiny_images",)
    batches = [pipeline.rows(step, 0, 4) for step in range(12)]
    values = np.concatenate([batch["image"][:, 0, 0, 0] for batch in batches]) - 1
    labels = np.concatenate([batch["label"] for batch in batches])
    assert batches[0]["image"].shape == (4, SIDE, SIDE, 1)
    assert batches[0]["image"].dtype == np.uint8 and labels.dtype == np.int32
    assert sorted(values[:23]) == sorted(values[23:46]) == list(range(23))
    np.testing.assert_array_equal(labels, values % 2)
    assert list(values[:23]) != list(values[23:46])
    other = config(tiny_images).open(seed=1)
    assert (other.rows(0, 0, 4)["image"] != batches[0]["image"]).any()


def test_a_row_depends_on_seed_step_and_place_alone(tiny_images):
    data = config(tiny_images, shift=2, flip=True, domains_are_classes=True)
    pipeline = data.open(seed=3)
    whole = pipeline.rows(5, 0, 4)
    again = data.open(seed=3)
    for start, stop in ((2, 4), (0, 1)):
        part = again.rows(5, start, stop)
        for name, values in part.items():
            np.testing.assert_array_equal(values, whole[name][start:stop])
    assert pipeline.domains == ("even", "odd")
    np.testing.assert_array_equal(whole["domain"], whole["label"])


def test_shifted_images_keep_their_values_and_all_places_occur(tiny_images):
    """A shifted constant image is a rectangle at an edge: rows and columns of 0 tell the shift."""
    pipeline = config(tiny_images, shift=1).open(seed=0)
    seen = set()
    for step in range(30):
        for image in pipeline.rows(step, 0, 4)["image"][:, :, :, 0]:
            value = image.max()
            assert set(np.unique(image)) <= {0, value}
            rows, columns = (image == value).any(axis=1), (image == value).any(axis=0)
            assert (image == value * np.outer(rows, columns)).all()
            assert rows[1:-1].all() and columns[1:-1].all()
            seen.add((rows[0], rows[-1], columns[0], columns[-1]))
    assert len(seen) == 9


def test_flips_mirror_half_of_the_images(tiny_images):
    pipeline = config(tiny_images, flip=True).open(seed=0)
    ramp = np.arange(SIDE)[None, :, None] * np.ones((SIDE, 1, 1))
    flipped = [
        bool((pipeline._augmented(ramp, np.random.default_rng(n)) != ramp).any())
        for n in range(200)
    ]
    assert 70 < sum(flipped) < 130


def test_held_out_batches_are_filled_up(tiny_images):
    pipeline = config(tiny_images, shift=2).open(seed=0)
    batches = pipeline.held_out_batches("validation", 100)
    assert [int(batch["mask"].sum()) for batch in batches] == [4, 4, 4, 4, 4, 3]
    values = np.concatenate([batch["image"][batch["mask"]] for batch in batches])
    assert sorted(np.unique(values)) == list(range(1, 24))  # Not shifted: no 0.
    assert batches[-1]["image"][-1].max() == 0
    assert len(pipeline.held_out_batches("validation", 2)) == 2
    with pytest.raises(UserError, match="split='test' is not in dataset"):
        pipeline.held_out_batches("test", 1)


def test_the_record_has_the_entropy_of_the_labels(tiny_images):
    record = config(tiny_images).open(seed=0).record()
    even, odd = 12 / 23, 11 / 23
    assert record["trivial_loss"] == pytest.approx(-even * math.log(even) - odd * math.log(odd))
    assert record["train_images"] == 23
    part = config(tiny_images, train_split="train[:50%]").open(seed=0)
    assert part.sha256 != record["sha256"] and part.rows_per_epoch in (11, 12)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"image_feature": "picture"}, "image_feature is 'picture', .* are image, label, name"),
        ({"image_feature": "name"}, "image_feature is 'name', which is no image"),
        ({"label_feature": "name"}, "label_feature is 'name', which is no class label"),
        ({"channels": 3}, "channels is 3, but .* has 1; set data.channels and model.channels"),
        ({"num_classes": 10}, "num_classes is 10, but .* has 2"),
        ({"shift": SIDE}, "shift is 6; it must be at least 0 and below data.image_size=6"),
        ({"image_size": 0}, "image_size is 0; it must be at least 1"),
    ],
)
def test_what_the_dataset_is_not_is_refused(tiny_images, fields, words):
    with pytest.raises(UserError, match=words):
        config(tiny_images, **fields).open(seed=0)


def test_fitting_crops_the_middle_of_the_longer_side():
    image = np.zeros((4, 8, 3), np.uint8)
    image[:, 2:6] = 100
    assert fitted(image, 4).shape == (4, 4, 3)
    assert fitted(image, 4).min() == 100
    larger = fitted(image[:, :, :1], 8)
    assert larger.shape == (8, 8, 1) and larger[:, 1:-1].min() == 100
    with pytest.raises(UserError, match="4 x 8 pixels of 2 channels"):
        fitted(image[:, :, :2], 4)


def test_digits_are_read_and_split_by_their_pixels(tmp_path):
    random = np.random.default_rng(0)
    rows = random.integers(0, 256, (40, 785))
    rows[:, -1] = np.arange(40) % 2
    path = tmp_path / "digits.csv.gz"
    path.write_bytes(gzip.compress("\n".join(",".join(map(str, row)) for row in rows).encode()))
    images, labels = read_digits(path)
    np.testing.assert_array_equal(images.reshape(40, -1), rows[:, :-1])
    splits = split_by_label(ClassifiedImages(images, labels))
    assert {split: len(indices) for split, indices in splits.items()} == {
        "train": 32, "validation": 4, "test": 4
    }  # fmt: skip
    assert sorted(n for indices in splits.values() for n in indices) == list(range(40))
    order = random.permutation(40)
    moved = split_by_label(ClassifiedImages(images[order], labels[order]))
    digests = [
        {hashlib.sha256(i[n].tobytes()).digest() for n in s["test"]}
        for i, s in ((images, splits), (images[order], moved))
    ]
    assert digests[0] == digests[1]
    path.write_bytes(b"not gzip")
    with pytest.raises(UserError, match="does not hold images of 28 x 28"):
        read_digits(path)


def test_batches_have_the_shapes_that_the_config_says(tiny_images):
    data = config(tiny_images)
    assert_batch_shapes(data, data.open(seed=0))
