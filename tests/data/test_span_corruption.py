"""T5's span corruption against its definition."""

import collections
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.data.span_corruption import (
    SpanCorruptionData,
    SpanLengths,
    corrupt,
    lengths_of_inputs,
    noise_mask,
    span_lengths,
)
from moe_jax.data.tokenizers import Bytes, ByteTokenizer
from moe_jax.errors import UserError
from tests.data.shapes import assert_batch_shapes

EOS = ByteTokenizer.EOS


def test_the_papers_lengths():
    """Raffel et al. 2020 and Fedus et al. 2021: 512 inputs have 114 targets."""
    lengths = lengths_of_inputs(512, 0.15, 3.0)
    assert lengths == SpanLengths(raw=568, noise=85, spans=28)
    assert (lengths.inputs, lengths.targets) == (512, 114)


@given(st.integers(3, 200), st.floats(0.01, 0.5), st.floats(1, 10))
def test_inputs_have_exactly_the_length_that_was_asked_for(length, density, mean_span):
    lengths = lengths_of_inputs(length, density, mean_span)
    assert lengths.inputs == length
    assert span_lengths(lengths.raw + 1, density, mean_span).inputs > length


def test_the_papers_example():
    """Figure 2: `Thank you <X> me to your party <Y> week` and `<X> for inviting <Y> last`."""
    words = ["Thank", "you", "for", "inviting", "me", "to", "your", "party", "last", "week"]
    tokens = np.arange(10, 10 + len(words), dtype=np.int32)
    mask = np.isin(words, ["for", "inviting", "last"])
    inputs, targets = corrupt(tokens, mask, np.arange(99, 0, -1))
    assert inputs.tolist() == [10, 11, 99, 14, 15, 16, 17, 98, 19, EOS]
    assert targets.tolist() == [99, 12, 13, 98, 18, EOS]


@given(st.integers(4, 80), st.floats(0.05, 0.5), st.floats(1, 5), st.integers(0, 99))
def test_spans_put_back_give_the_text(raw, density, mean_span, seed):
    lengths = span_lengths(raw, density, mean_span)
    mask = noise_mask(lengths, np.random.default_rng(seed))
    tokens = np.arange(3, raw + 3, dtype=np.int32)
    assert (len(mask), mask.sum()) == (raw, lengths.noise)
    assert not mask[0] and mask[-1]
    inputs, targets = corrupt(tokens, mask, np.arange(1000, 0, -1))
    assert (len(inputs), len(targets)) == (lengths.inputs, lengths.targets)
    spans, sentinel = collections.defaultdict(list), 0
    for token in targets[:-1]:
        if token > 500:
            sentinel = token
        else:
            spans[sentinel].append(token)
    assert list(spans) == [1000 - n for n in range(lengths.spans)]
    text = [t for token in inputs[:-1] for t in (spans[token] if token > 500 else [token])]
    assert text == tokens.tolist()


def test_all_divisions_into_spans_are_equally_likely():
    lengths = SpanLengths(raw=8, noise=4, spans=2)
    random = np.random.default_rng(0)
    counts = collections.Counter(
        noise_mask(lengths, random).astype(int).astype(str).tobytes() for _ in range(1800)
    )
    # Three divisions of 4 into 2, for the spans and for what is between.
    assert len(counts) == 9
    assert max(abs(count - 200) for count in counts.values()) < 5 * math.sqrt(200)


@pytest.fixture
def config(tiny_text):
    return SpanCorruptionData(
        dataset=str(tiny_text),
        tokenizer=Bytes(extra_ids=8),
        input_length=64,
        batch_size=4,
    )


def test_rows_are_corrupted_text(config):
    pipeline = config.open(0)
    batch = pipeline.rows(0, 0, 4)
    assert batch["inputs"].shape == (4, 64) and batch["inputs"].dtype == np.int32
    assert batch["targets"].shape == (4, config.target_length + 1)
    assert (batch["targets"][:, 0] == ByteTokenizer.BOS).all()
    assert (batch["inputs"][:, -1] == EOS).all() and (batch["targets"][:, -1] == EOS).all()
    sentinels = pipeline.tokenizer.vocab_size - 1 - np.arange(config.lengths.spans)
    assert "<extra_id_0>" in pipeline.tokenizer.decode(batch["inputs"][0])
    for row in (*batch["inputs"], *batch["targets"]):
        assert row[row >= ByteTokenizer.text_ids].tolist() == sentinels.tolist()


def test_spans_are_a_function_of_seed_step_and_row(config):
    one, again = config.open(0), config.open(0)
    whole = one.rows(1, 0, 4)
    np.testing.assert_array_equal(whole["inputs"][1:3], again.rows(1, 1, 3)["inputs"])
    masks = {tuple(row >= ByteTokenizer.text_ids) for row in whole["inputs"]}
    masks |= {tuple(row >= ByteTokenizer.text_ids) for row in one.rows(2, 0, 4)["inputs"]}
    assert len(masks) == 8


def test_held_out_rows_are_always_the_same(config):
    config.batch_size = 7
    batches, same = (config.open(seed).held_out_batches("validation", 100) for seed in (0, 1))
    for batch, again in zip(batches, same, strict=True):
        for name in ("inputs", "targets", "domain", "mask"):
            np.testing.assert_array_equal(batch[name], again[name])
    filler = ~batches[-1]["mask"]
    assert filler.any()
    assert not batches[-1]["inputs"][filler].any() and not batches[-1]["targets"][filler].any()


def test_the_trivial_loss_is_the_entropy_of_the_targets(config):
    pipeline = config.open(0)
    targets = np.concatenate([pipeline.rows(step, 0, 4)["targets"][:, 1:] for step in range(300)])
    _, counts = np.unique(targets, return_counts=True)
    shares = counts / counts.sum()
    expected = -(shares * np.log(shares)).sum()
    assert pipeline.record()["trivial_loss"] == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_length": 2}, "data.input_length is 2; it must be at least 3"),
        ({"noise_density": 0.0}, "data.noise_density is 0.0; it must be above 0"),
        ({"noise_density": 0.6}, "data.noise_density is 0.6; it must be above 0 and at most 0.5"),
        ({"mean_span": 0.5}, "data.mean_span is 0.5; it must be at least 1"),
        ({"tokenizer": Bytes()}, "extra_ids is 0, but the 3 spans of data.input_length=64 need"),
    ],
)
def test_bad_fields_are_named(config, changes, message):
    for field, value in changes.items():
        setattr(config, field, value)
    with pytest.raises(UserError, match=message):
        config.validate()


def test_batches_have_the_shapes_that_the_config_says(config):
    assert_batch_shapes(config, config.open(seed=0))
