import concurrent.futures
import json
import multiprocessing
import os
import platform
import shutil
import sys

import pytest
import tensorflow_datasets as tfds
from array_record.python import array_record_module

from moe_jax.data import sources
from moe_jax.data.sources import open_dataset, prepare_dataset
from moe_jax.errors import UserError


@pytest.fixture
def copy(tiny_text, tmp_path):
    directory = tmp_path / "tiny_text" / "1.0.0"
    shutil.copytree(tiny_text, directory)
    return directory


def _record_file(directory, split="train"):
    (path,) = directory.glob(f"*-{split}.array_record-*")
    return path


def test_opens_a_directory(tiny_text):
    dataset = open_dataset(str(tiny_text), "", "train")
    assert dataset.name == "tiny_text/1.0.0"
    assert dataset.directory == tiny_text
    assert list(dataset.file_sha256) == [_record_file(tiny_text).name]
    assert len(list(dataset)) == len(dataset.examples) == 54 + 36 + 18
    assert dataset.examples[5]["text"] == list(dataset)[5]["text"]


def test_opens_by_name(tiny_text):
    by_name = open_dataset("tiny_text", str(tiny_text.parent.parent), "validation")
    assert by_name.directory == tiny_text
    assert len(by_name.examples) == 3 + 2 + 1


def test_opens_a_slice(tiny_text):
    assert len(open_dataset(str(tiny_text), "", "train[:10]").examples) == 10


def test_data_dir_defaults_to_that_of_tfds(monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert sources.resolve_data_dir("") == tmp_path
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert str(sources.resolve_data_dir("")) == "/home/somebody/tensorflow_datasets"
    assert str(sources.resolve_data_dir("~/data")) == "/home/somebody/data"


def test_a_tfds_name_under_mock_data():
    with tfds.testing.mock_data(num_examples=7):
        dataset = open_dataset("lm1b", "", "train")
        examples = list(dataset)
    assert dataset.name == "lm1b/1.1.0"
    assert len(examples) == 7
    assert set(dataset.features) == {"text"}


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("debian_text", "train", r"not prepared in .*prepare_data --dataset=debian_text"),
        ("lm1b", "train", r"not prepared in .*tfds build lm1b --file_format=array_record"),
        ("c4", "train", "no name that TensorFlow Datasets resolves without TensorFlow"),
        ("wrong_name", "train", "or one of .*debian_text.*python_library"),
        ("/no/such/folder", "train", r"has no dataset_info\.json"),
        (
            "tiny_text",
            "dev",
            "split='dev' is not in dataset='tiny_text', which has train, validation, test",
        ),
    ],
)
def test_a_dataset_that_cannot_be_opened(tiny_text, name, split, message):
    with pytest.raises(UserError, match=message) as raised:
        open_dataset(name, str(tiny_text.parent.parent), split)
    assert "\n" not in str(raised.value)


def test_a_dataset_of_another_file_format(copy):
    description = copy / "dataset_info.json"
    description.write_text(description.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match=r"file format tfrecord, .* file_format=array_record"):
        open_dataset(str(copy), "", "train")


def test_only_own_datasets_are_prepared(tmp_path):
    with pytest.raises(
        UserError, match="dataset='lm1b' cannot be prepared; valid are debian_text, "
    ):
        prepare_dataset("lm1b", str(tmp_path))


# From a file cut at 65536 bytes, a block's end, array_record reads empty records silently.
@pytest.mark.parametrize("size", [0, 1000, 65535, 65536, 131071])
def test_a_truncated_record_file(copy, size):
    path = _record_file(copy)
    assert path.stat().st_size == 131072
    os.truncate(path, size)
    with pytest.raises(UserError, match="is damaged or incomplete") as raised:
        open_dataset(str(copy), "", "train")
    assert str(copy) in str(raised.value)
    assert "delete that folder and run `" in str(raised.value)
    assert "prepare_data --dataset=tiny_text" in str(raised.value)
    assert "--import=tests.data.conftest" in str(raised.value)


def test_a_missing_record_file(copy):
    _record_file(copy).unlink()
    with pytest.raises(UserError, match="damaged or incomplete"):
        open_dataset(str(copy), "", "train")


def test_a_record_file_with_too_few_records(copy):
    shutil.copy(_record_file(copy, "validation"), _record_file(copy, "train"))
    with pytest.raises(UserError, match="damaged or incomplete"):
        open_dataset(str(copy), "", "train")


def test_a_flipped_byte_is_found_while_reading(copy):
    path = _record_file(copy)
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged or incomplete"):
        list(open_dataset(str(copy), "", "train"))


def _refused(folder):
    with pytest.raises(UserError, match="damaged or incomplete") as raised:
        list(open_dataset(str(folder), "", "train"))
    told = str(raised.value)
    assert "\n" not in told and told.endswith(".") and ". " not in told
    return told


@pytest.mark.parametrize(
    "content",
    [b"", b"hello world\n" * 99, bytes(131072), b"\x10" + bytes(7) + b"abcd" * 99],
    ids=["empty", "text", "zeros", "tfrecord"],
)
def test_record_files_of_other_bytes(copy, content):
    path = _record_file(copy)
    path.write_bytes(content)
    assert f"({path.name} has 0 readable records of 108)" in _refused(copy)


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "loop"])
def test_record_files_that_are_no_files(copy, kind):
    """From a pipe the reader would never return."""
    path = _record_file(copy)
    path.unlink()
    {
        "folder": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/zero"),
        "loop": lambda: path.symlink_to(path),
    }[kind]()
    assert path.name in _refused(copy)


@pytest.mark.parametrize("record", [b"hello", bytes(100), b"\xff" * 80])
def test_records_that_are_no_examples(copy, record):
    """A whole array_record file, whose records TFDS cannot decode."""
    _write_records(copy, record)
    assert "DecodeError" in _refused(copy)


def test_records_without_the_features(copy):
    """TFDS takes what a record lacks for None."""
    _write_records(copy, b"")
    assert "(example 0 has no " in _refused(copy)


def _write_records(copy, record):
    path = _record_file(copy)
    path.unlink()
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for _ in range(108):
        writer.write(record)
    writer.close()


def test_a_copy_outside_of_its_place_is_not_to_be_deleted(copy, tmp_path):
    """Only what lies in ROOT/NAME/VERSION can be made again by its name."""
    shutil.copytree(copy, tmp_path / "mine")
    _record_file(tmp_path / "mine").write_bytes(b"")
    assert "; bring back a copy of it, or name" in _refused(tmp_path / "mine")


def test_data_dir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="dataset=python_library could not be written to data_dir="):
        prepare_dataset("python_library", str(tmp_path / "file"))


def test_two_preparations_at_once(tmp_path):
    """The slower one finds the other's dataset in place and uses it."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
        tasks = [
            pool.submit(open_dataset, "python_library", str(tmp_path), "test") for _ in range(2)
        ]
        first, second = (task.result() for task in tasks)
    assert first.directory == second.directory
    assert first.file_sha256 == second.file_sha256
    assert [path.name for path in first.directory.parent.iterdir()] == [platform.python_version()]


@pytest.mark.parametrize("by_name", [True, False])
@pytest.mark.parametrize("legacy", [True, False])
def test_the_files_of_a_dataset_get_no_module_imported(
    tiny_text, tmp_path, monkeypatch, by_name, legacy
):
    folder = tmp_path / "strangers_text" / "1.0.0"  # A name that no builder in this process has.
    shutil.copytree(tiny_text, folder)
    (tmp_path / "strangers_module.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    file = folder / "features.json"
    named = "strangers_module.Feature"
    if legacy:
        file.write_text(json.dumps({"type": named, "content": {}}))
    else:
        features = json.loads(file.read_text())
        features["featuresDict"]["features"]["text"]["pythonClassName"] = named
        file.write_text(json.dumps(features))
    asked = ("strangers_text", str(tmp_path)) if by_name else (str(folder), "")
    with pytest.raises(UserError, match=r"'strangers_module\.Feature'.*--import=strangers_module"):
        open_dataset(*asked, "train")
    assert "strangers_module" not in sys.modules
