import concurrent.futures
import dataclasses
import json
import multiprocessing
import pathlib

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_jax.data.packing import PackedText, pack
from moe_jax.data.sources import OpenedDataset, open_dataset
from moe_jax.data.tokenizers import ByteTokenizer
from moe_jax.errors import UserError


def _dataset(texts: list[tuple[str, str | bytes]], directory=pathlib.Path()) -> OpenedDataset:
    return OpenedDataset(
        name="made/1.0.0",
        split="train",
        directory=directory,
        features={
            "text": tfds.features.Text(),
            "domain": tfds.features.Text(),
            "label": tfds.features.ClassLabel(names=["no", "yes"]),
        },
        examples=[{"text": t, "domain": d, "label": i % 2} for i, (d, t) in enumerate(texts)],
        file_sha256={},
    )


def _pack(dataset, cache, domain_feature="domain"):
    return pack(dataset, ByteTokenizer(), ["text"], domain_feature, cache)


def _stream(rows: np.ndarray) -> np.ndarray:
    return np.concatenate([rows[0, :1], rows[:, 1:].ravel()])


def test_decoding_the_rows_returns_the_text(tiny_text, tmp_path):
    dataset = open_dataset(str(tiny_text), "", "train")
    packed = PackedText(_pack(dataset, tmp_path), sequence_length=16)
    assert list(packed) == ["fruit", "metal", "tree"]
    for domain, rows in packed.items():
        assert rows.dtype == np.uint16
        assert rows.shape[1] == 17
        texts = [e["text"].decode() for e in dataset if e["domain"].decode() == domain]
        decoded = ByteTokenizer().decode(_stream(rows))
        assert "".join(texts).startswith(decoded.rstrip("\ufffd"))
        assert len("".join(texts)) - len(decoded) < 17
        assert np.sum(_stream(rows) == ByteTokenizer.EOS) in (len(texts) - 1, len(texts))


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    texts=st.lists(
        st.tuples(st.sampled_from("ab/"), st.text(max_size=30)), min_size=1, max_size=12
    ),
    length=st.integers(1, 40),
)
def test_every_token_is_a_target_once_or_dropped(tmp_path, texts, length):
    dataset = _dataset(texts)
    # The name of a pack does not depend on examples in memory, so each case has its own folder.
    cache = tmp_path / str(abs(hash((tuple(texts), length))))
    packed = PackedText(_pack(dataset, cache), length)
    total = 0
    for domain in {domain for domain, _ in texts}:
        stream = []
        for text in (text for label, text in texts if label == domain):
            stream += [*ByteTokenizer().encode(text).tolist(), ByteTokenizer.EOS]
        rows = packed[domain]
        assert rows.shape == ((len(stream) - 1) // length, length + 1)
        for i, row in enumerate(rows):
            assert row.tolist() == stream[i * length : (i + 1) * length + 1]
        total += len(stream) - 1
    assert packed.num_tokens + packed.dropped_tokens == total


def test_unigram_entropy_is_that_of_the_targets(tmp_path):
    packed = PackedText(_pack(_dataset([("a", "xyxy" * 4096 * 3)]), tmp_path), sequence_length=2)
    targets = np.concatenate([rows[:, 1:].ravel() for rows in packed.values()])
    _, counts = np.unique(targets, return_counts=True)
    expected = -np.sum(counts / counts.sum() * np.log(counts / counts.sum()))
    assert packed.unigram_entropy() == pytest.approx(expected)
    assert packed.unigram_entropy() == pytest.approx(np.log(2), abs=1e-3)


def test_a_second_pack_reads_nothing(tiny_text, tmp_path):
    dataset = open_dataset(str(tiny_text), "", "test")
    first = _pack(dataset, tmp_path)
    unreadable = dataclasses.replace(dataset, examples=[None] * len(dataset.examples))
    assert _pack(unreadable, tmp_path) == first
    assert PackedText(first, 8).sha256 == PackedText(first, 32).sha256


def test_a_changed_file_split_or_feature_is_packed_anew(tiny_text, tmp_path):
    dataset = open_dataset(str(tiny_text), "", "test")
    others = [
        _pack(dataclasses.replace(dataset, file_sha256={"f": "0"}), tmp_path),
        _pack(open_dataset(str(tiny_text), "", "validation"), tmp_path),
        _pack(dataset, tmp_path, domain_feature=""),
    ]
    assert len({_pack(dataset, tmp_path), *others}) == 4


def test_domains_of_classes_and_of_none(tmp_path):
    dataset = _dataset([("a", "first"), ("b", "second")])
    assert set(PackedText(_pack(dataset, tmp_path, "label"), 2)) == {"no", "yes"}
    assert set(PackedText(_pack(dataset, tmp_path, ""), 2)) == {"made"}


@pytest.mark.parametrize(
    ("text_feature", "domain_feature", "message"),
    [
        (
            "body",
            "",
            "text_feature='body' is not a feature of 'made/1.0.0', which has text, domain",
        ),
        (
            "text",
            "topic",
            "domain_feature='topic' is not .* name one of them, or the empty string for one domain",
        ),
        ("label", "", "text_feature='label' of 'made/1.0.0' does not hold text"),
    ],
)
def test_a_feature_that_is_not_there(tmp_path, text_feature, domain_feature, message):
    with pytest.raises(UserError, match=message):
        pack(_dataset([("a", "t")]), ByteTokenizer(), [text_feature], domain_feature, tmp_path)


def test_text_that_is_not_utf8_is_located_and_leaves_nothing(tmp_path):
    dataset = _dataset([("a", b"good"), ("b", b"caf\xe9 noir")])
    with pytest.raises(UserError) as raised:
        _pack(dataset, tmp_path)
    assert str(raised.value) == (
        "example 1 (domain 'b') of 'made/1.0.0' train is not UTF-8: byte 0xe9 at offset 3 "
        "(invalid continuation byte); re-encode the text as UTF-8 and prepare it again."
    )
    assert not list(tmp_path.iterdir())


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be written to .*; choose a data_dir"):
        _pack(_dataset([("a", "text")]), tmp_path / "file" / "packed")


@pytest.mark.parametrize("damage", ["truncate", "remove", "index"])
def test_damaged_packed_text(tmp_path, damage):
    packed = _pack(_dataset([("a", "text")]), tmp_path)
    (stream,) = packed.glob("*.uint16")
    if damage == "truncate":
        stream.write_bytes(stream.read_bytes()[:-1])
    elif damage == "remove":
        stream.unlink()
    else:
        (packed / "index.json").write_text("{")
    with pytest.raises(UserError, match=r"is damaged .*; delete that folder and it is made again"):
        PackedText(packed, 2)


def _pack_from_process(directory: str, cache: str) -> str:
    dataset = open_dataset(directory, "", "train")
    return str(pack(dataset, ByteTokenizer(), ["text"], "domain", pathlib.Path(cache)))


def test_processes_that_pack_at_once_agree(tiny_text, tmp_path):
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
        tasks = [pool.submit(_pack_from_process, str(tiny_text), str(tmp_path)) for _ in range(2)]
        first, second = (task.result() for task in tasks)
    assert first == second
    assert [path.name for path in tmp_path.iterdir()] == [pathlib.Path(first).name]
    assert PackedText(pathlib.Path(first), 16).num_tokens > 0


def test_the_loser_of_a_race_uses_the_winners_folder(tmp_path):
    """The second packer starts before the first has finished."""
    winner = []

    class Examples(list):
        def __getitem__(self, index):
            if not winner:
                winner.append(None)
                winner.append(_pack(dataset, tmp_path))
            return super().__getitem__(index)

    dataset = _dataset([("a", "text")])
    loser = _pack(dataclasses.replace(dataset, examples=Examples(dataset.examples)), tmp_path)
    assert [path for path in tmp_path.iterdir()] == [loser] == winner[1:]


def test_the_index_says_what_was_packed(tmp_path):
    packed = _pack(_dataset([("a/b", "text")]), tmp_path)
    index = json.loads((packed / "index.json").read_text())
    assert index["identity"]["dataset"] == "made/1.0.0"
    assert index["streams"]["a/b"]["tokens"] == 5
