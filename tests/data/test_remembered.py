"""A second start reads neither record files nor training tokens again."""

import json
import os

import pytest

from moe_jax.data import images, packing, sources
from moe_jax.data.images import ImageData
from moe_jax.data.pipelines import TextData
from moe_jax.data.remembered import file_name, remembered, stamps
from moe_jax.data.sources import prepare_dataset
from moe_jax.errors import UserError
from tests.data.test_images import SIDE, TinyImages


def test_it_is_computed_once_for_the_same(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return {"value": len(calls)}

    path = tmp_path / "kept" / "value.json"
    assert remembered(path, {"a": (1, 2)}, compute) == {"value": 1}
    assert remembered(path, {"a": [1, 2]}, compute) == {"value": 1}
    assert remembered(path, {"a": [1, 3]}, compute) == {"value": 2}
    assert os.listdir(path.parent) == ["value.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", "5", '{"of": {}}', "null"])
def test_a_damaged_file_is_computed_again(tmp_path, text):
    path = tmp_path / "value.json"
    path.write_text(text)
    assert remembered(path, {}, lambda: 3) == 3
    assert json.loads(path.read_text()) == {"of": {}, "value": 3}


def test_a_place_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    assert remembered(tmp_path / "file" / "value.json", {}, lambda: 3) == 3


def test_a_strangers_name_stays_in_the_folder():
    assert file_name("labels", "../../x", "a/b") == "labels_______x_a_b.json"


def test_stamps_change_with_the_file(tmp_path):
    path = tmp_path / "a"
    path.write_text("x")
    before = stamps([path])
    path.write_text("y")
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert stamps([path]) != before


def test_a_second_start_on_text_hashes_no_file_and_counts_no_token(data_dir, monkeypatch):
    config = TextData(data_dir=data_dir, sequence_length=48, batch_size=4)
    first = config.open(0).record()
    monkeypatch.setattr(sources, "_sha256", None)
    monkeypatch.setattr(packing, "entropy", None)
    assert config.open(0).record() == first


def test_a_second_start_on_images_reads_no_labels(tmp_path, monkeypatch):
    TinyImages(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    config = ImageData(
        dataset=TinyImages.name, data_dir=str(tmp_path), image_size=SIDE, num_classes=2
    )
    first = images.ImagePipeline(config, 0).record()
    monkeypatch.setattr(sources, "_sha256", None)
    monkeypatch.setattr(images, "_read_labels", None)
    assert images.ImagePipeline(config, 0).record() == first


def test_a_changed_file_is_hashed_again(tmp_path):
    builder = prepare_dataset("python_library", str(tmp_path))
    opened = sources.open_dataset("python_library", str(tmp_path), "train")
    (name,) = opened.file_sha256
    path = builder.data_path / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    try:
        again = sources.open_dataset("python_library", str(tmp_path), "train").file_sha256
        assert again[name] != opened.file_sha256[name]
    except UserError as error:  # Where the byte was one of the reader's own.
        assert "damaged" in str(error)
