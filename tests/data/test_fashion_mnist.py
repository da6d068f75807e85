"""Fashion-MNIST from a small package that stands for Debian's."""

import hashlib
import struct

import numpy as np
import pytest

from moe_jax.data.builders import fashion_mnist
from moe_jax.data.builders.fashion_mnist import idx_array
from moe_jax.data.images import ImageData
from moe_jax.data.sources import prepare_dataset
from moe_jax.errors import UserError
from tests.data.package_clients import install_debian_store, write_tar

FOLDER = "./usr/share/datasets/fashion-mnist"


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">4B{array.ndim}i", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_package(store, contents: dict[str, bytes]) -> None:
    files = {f"{FOLDER}/{name}.gz": content for name, content in contents.items()}
    write_tar(store / "dataset-fashion-mnist_0.0-1_all.deb", files, "w")


@pytest.fixture
def contents(tmp_path, monkeypatch) -> dict[str, bytes]:
    """40 random training images and 10 test images in a package whose files are the authors'."""
    random = np.random.default_rng(0)
    made = {}
    for part, count in (("train", 40), ("t10k", 10)):
        images = random.integers(0, 256, (count, 28, 28), np.uint8)
        made[f"{part}-images-idx3-ubyte"] = idx(images)
        made[f"{part}-labels-idx1-ubyte"] = idx(np.arange(count, dtype=np.uint8) % 10)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in made.items()}
    monkeypatch.setattr(fashion_mnist, "SHA256", digests)
    monkeypatch.setattr(fashion_mnist, "VALIDATION_PER_CLASS", 1)
    store = tmp_path / "store"
    store.mkdir()
    write_package(store, made)
    install_debian_store(store, monkeypatch)
    return made


def read(builder, split: str) -> list[tuple[bytes, int]]:
    """Each image's pixels and label."""
    return [(e["image"].tobytes(), int(e["label"])) for e in builder.as_data_source(split)]


def test_the_authors_test_images_stay_and_validation_is_of_the_training_images(contents, tmp_path):
    builder = prepare_dataset("fashion_mnist", str(tmp_path / "data"))
    splits = {split: read(builder, split) for split in ("train", "validation", "test")}
    counts = {s: np.bincount([label for _, label in found]) for s, found in splits.items()}
    assert {s: set(of_split) for s, of_split in counts.items()} == {
        "train": {3}, "validation": {1}, "test": {1}
    }  # fmt: skip
    train = [image.tobytes() for image in idx_array(contents["train-images-idx3-ubyte"])]
    test = [image.tobytes() for image in idx_array(contents["t10k-images-idx3-ubyte"])]
    assert dict(splits["test"]) == {image: n % 10 for n, image in enumerate(test)}
    labels = {image: n % 10 for n, image in enumerate(train)}
    assert dict(splits["train"] + splits["validation"]) == labels
    # The choice depends on pixels alone.
    first = min(train[::10], key=lambda image: hashlib.sha256(image).digest())
    assert (first, 0) in splits["validation"]


def test_the_dataset_says_what_it_holds_and_can_be_trained_on(contents, tmp_path):
    facts = prepare_dataset("fashion_mnist", str(tmp_path / "data")).info.metadata
    assert facts["domains"]["ankle boot"] == {"bytes": 5 * 28**2, "documents": 5}
    assert facts["packages"]["dataset-fashion-mnist"]["version"] == "0.0-1"
    assert len(facts["corpus_sha256"]) == 64
    data = ImageData(dataset="fashion_mnist", data_dir=str(tmp_path / "data"), batch_size=4)
    assert data.open(seed=0).record()["train_images"] == 30


def test_files_that_are_not_the_authors_are_refused(contents, tmp_path):
    name = "t10k-labels-idx1-ubyte"
    write_package(tmp_path / "store", contents | {name: idx(np.zeros(10, np.uint8))})
    with pytest.raises(UserError, match=f"file {name} of the package .* has the sha256 "):
        prepare_dataset("fashion_mnist", str(tmp_path / "data"))


def test_a_missing_file_is_named(contents, tmp_path):
    name = "t10k-labels-idx1-ubyte"
    rest = {other: content for other, content in contents.items() if other != name}
    write_package(tmp_path / "store", rest)
    with pytest.raises(UserError, match=f"lacks {name}; dataset=mnist5k needs only pip"):
        prepare_dataset("fashion_mnist", str(tmp_path / "data"))


@pytest.mark.parametrize("content", [b"", b"\0\0\x0d\x01" + bytes(8), idx(np.zeros(3, "u1"))[:-1]])
def test_what_is_no_idx_file_is_refused(content):
    with pytest.raises(ValueError):
        idx_array(content)
