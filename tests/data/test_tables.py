"""Rows of numbers, and the vowels as the real table that every test of them reads."""

import collections

import numpy as np
import pytest

from moe_jax.data.builders import vowels
from moe_jax.data.sources import prepare_dataset
from moe_jax.data.tables import TableData
from moe_jax.errors import UserError
from tests.data.shapes import assert_batch_shapes


@pytest.fixture(scope="module")
def vowel_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vowels")
    prepare_dataset("peterson_barney", str(folder))
    return str(folder)


def test_the_table_is_peterson_and_barneys():
    examples = vowels.utterances(vowels.praat_table())
    assert len(examples) == 76 * 10 * 2
    groups = {example["speaker"]: example["group"] for example in examples}
    assert collections.Counter(groups.values()) == {"man": 33, "woman": 28, "child": 15}
    first = examples[0]
    assert (first["vowel"], first["f1"], first["f2"], first["f3"]) == ("iy", 240, 2280, 2850)
    men = [e["f2"] for e in examples if e["group"] == "man" and e["vowel"] == "iy"]
    assert np.mean(men) == pytest.approx(2290, rel=0.01)  # Their Table II.


def test_no_speaker_is_in_both_splits():
    examples = vowels.utterances(vowels.praat_table())
    splits = vowels.speakers_of_splits(examples)
    assert {name: len(speakers) for name, speakers in splits.items()} == {"train": 50, "test": 25}
    assert not splits["train"] & splits["test"]


def test_rows_hold_formants_targets_and_domains(vowel_dir):
    data = TableData(data_dir=vowel_dir, class_targets=(1, 0, 1, 0), batch_size=400)
    pipeline = data.open(seed=0)
    assert pipeline.domains == ("aa", "ah", "ih", "iy")
    batch = pipeline.rows(0, 0, 400)
    assert batch["inputs"].shape == (400, 2) and batch["inputs"].dtype == np.float32
    wanted = {"iy": 1, "ih": 0, "aa": 1, "ah": 0}
    for domain, target in zip(batch["domain"], batch["targets"], strict=True):
        assert target == [wanted[pipeline.domains[domain]]]
    iy = batch["inputs"][batch["domain"] == 3]
    assert 0.2 < iy[:, 0].mean() < 0.4 and 2 < iy[:, 1].mean() < 3
    (held_out,) = pipeline.held_out_batches(data.held_out_split, 1)
    assert held_out["mask"].sum() == 200
    assert pipeline.record()["trivial_loss"] == pytest.approx(0.25)


def test_an_epoch_has_every_row_once(vowel_dir):
    data = TableData(data_dir=vowel_dir, batch_size=100)
    pipeline = data.open(seed=0)
    epoch = [pipeline.rows(step, 0, 100) for step in range(4)]
    domains = np.concatenate([batch["domain"] for batch in epoch])
    assert np.bincount(domains).tolist() == [100] * 4
    assert epoch[0]["targets"].shape == (100, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": ("iy", "ee")}, "data.classes names 'ee'"),
        ({"input_features": ("f1", "f9")}, "feature 'f9' is not in"),
        ({"class_targets": (1.0,)}, "data.class_targets has 1 entries for 4"),
        ({"input_divisor": 0.0}, "data.input_divisor is 0.0"),
        ({"held_out_split": "dev"}, "split='dev'"),
    ],
)
def test_what_the_dataset_lacks_is_named(vowel_dir, changes, message):
    data = TableData(data_dir=vowel_dir, **changes)
    with pytest.raises(UserError) as raised:
        data.open(seed=0)
    assert message in str(raised.value)


def test_batches_have_the_shapes_that_the_config_says(vowel_dir):
    data = TableData(data_dir=vowel_dir)
    assert_batch_shapes(data, data.open(seed=0))
