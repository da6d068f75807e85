import concurrent.futures

import numpy as np
import pytest
import tensorflow_datasets as tfds

from moe_jax.data.pipelines import TextData, TextPipeline
from moe_jax.data.tokenizers import ByteTokenizer
from moe_jax.errors import UserError
from tests.data.shapes import assert_batch_shapes

LENGTH, BATCH = 32, 16


def _config(tiny_text, **changes) -> TextData:
    fields = {"dataset": str(tiny_text), "sequence_length": LENGTH, "batch_size": BATCH}
    return TextData(**{**fields, **changes})


@pytest.fixture
def pipeline(tiny_text):
    return TextPipeline(_config(tiny_text), seed=0)


def _row_keys(rows) -> list[tuple[int, bytes]]:
    return [
        (int(domain), row.tobytes())
        for domain, row in zip(rows["domain"], rows["tokens"], strict=True)
    ]


def test_a_batch_has_the_promised_shapes(pipeline):
    rows = pipeline.rows(step=3, start=0, stop=BATCH)
    assert rows["tokens"].shape == (BATCH, LENGTH + 1)
    assert rows["tokens"].dtype == rows["domain"].dtype == np.int32
    assert pipeline.domains == ("fruit", "metal", "tree")
    words = {"fruit": "p", "metal": "n", "tree": "k"}  # Letters of no other domain's words.
    for domain, tokens in zip(rows["domain"], rows["tokens"], strict=True):
        assert words[pipeline.domains[domain]] in ByteTokenizer().decode(tokens)


@pytest.mark.parametrize("processes", [1, 2, 8])
def test_rows_do_not_depend_on_how_they_are_divided(pipeline, processes):
    whole = pipeline.rows(7, 0, BATCH)
    share = BATCH // processes
    parts = [pipeline.rows(7, i * share, (i + 1) * share) for i in range(processes)]
    for key in whole:
        np.testing.assert_array_equal(np.concatenate([part[key] for part in parts]), whole[key])


def test_rows_are_a_function_of_seed_and_step(tiny_text, pipeline):
    again = TextPipeline(_config(tiny_text), seed=0)
    other_seed = TextPipeline(_config(tiny_text), seed=1)
    later = _row_keys(pipeline.rows(5, 0, BATCH))
    assert _row_keys(again.rows(5, 0, BATCH)) == later, "read in another order of steps"
    assert _row_keys(pipeline.rows(6, 0, BATCH)) != later
    assert _row_keys(other_seed.rows(5, 0, BATCH)) != later


def test_an_epoch_covers_every_row_once(pipeline):
    every = sorted(
        (domain, row.astype(np.int32).tobytes())
        for domain, name in enumerate(pipeline.domains)
        for row in pipeline.train[name]
    )
    # Rows of a synthetic corpus repeat, so what is compared are multisets.
    n = pipeline.rows_per_epoch
    assert len(every) == n
    stream = []
    for step in range(2 * n // BATCH + 1):
        stream += _row_keys(pipeline.rows(step, 0, BATCH))
    first, second = stream[:n], stream[n : 2 * n]
    assert sorted(first) == sorted(second) == every
    assert first != second, "shuffled again"


@pytest.mark.parametrize(
    "weights", [{"tree": 3.0, "fruit": 1.0}, {"fruit": 1, "metal": 1, "tree": 8}]
)
def test_weights_are_reached(tiny_text, weights):
    pipeline = TextPipeline(_config(tiny_text, domain_weights=weights), seed=0)
    drawn = np.concatenate([pipeline.rows(step, 0, BATCH)["domain"] for step in range(50)])
    shares = np.bincount(drawn, minlength=3) / len(drawn)
    expected = [weights.get(domain, 0) / sum(weights.values()) for domain in pipeline.domains]
    np.testing.assert_allclose(shares, expected, atol=0.01)


def test_weights_do_not_depend_on_their_order(tiny_text):
    a = TextPipeline(_config(tiny_text, domain_weights={"tree": 1.0, "fruit": 2.0}), seed=0)
    b = TextPipeline(_config(tiny_text, domain_weights={"fruit": 2.0, "tree": 1.0}), seed=0)
    assert _row_keys(a.rows(2, 0, BATCH)) == _row_keys(b.rows(2, 0, BATCH))


def test_threads_read_the_same_rows(pipeline):
    expected = [_row_keys(pipeline.rows(step, 0, BATCH)) for step in range(40)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda step: _row_keys(pipeline.rows(step, 0, BATCH)), range(40)))
    assert read == expected


def test_held_out_batches_are_fixed_and_spread_over_domains(tiny_text, pipeline):
    batches = pipeline.held_out_batches("validation", num_batches=2)
    again = TextPipeline(_config(tiny_text), seed=9).held_out_batches("validation", num_batches=2)
    assert len(batches) == 2
    for batch, same in zip(batches, again, strict=True):
        for key in ("tokens", "domain", "mask"):
            np.testing.assert_array_equal(batch[key], same[key])
        assert batch["mask"].all()
        assert np.bincount(batch["domain"], minlength=3).min() >= 3
    domains = np.concatenate([batch["domain"] for batch in batches])
    assert np.bincount(domains).tolist() == [12, 12, 8], "eight are all of tree"
    keys = [key for batch in batches for key in _row_keys(batch)]
    assert len(set(keys)) > 20, "rows are taken from all over the split"


def test_a_short_split_is_padded(pipeline):
    batches = pipeline.held_out_batches("validation", num_batches=1000)
    held = np.concatenate([batch["mask"] for batch in batches])
    tokens = np.concatenate([batch["tokens"] for batch in batches])
    assert len(held) % BATCH == 0
    assert 0 < held.sum() < len(held) < 1000 * BATCH
    assert (tokens[~held] == ByteTokenizer.PAD).all()
    assert (tokens[held] != ByteTokenizer.PAD).all()
    sizes = np.bincount(np.concatenate([b["domain"][b["mask"]] for b in batches]))
    assert sizes[0] > sizes[1] > sizes[2] > 0, "every row of every domain"


def test_lm1b_by_name(tmp_path, monkeypatch):
    """TFDS' mock stands for a prepared dataset; its metadata folder is copied to be writable."""
    with tfds.testing.mock_data(num_examples=50):
        builder = tfds.builder("lm1b")
        monkeypatch.setattr(type(builder), "data_path", tmp_path / "lm1b" / "1.1.0")
        (tmp_path / "lm1b" / "1.1.0").mkdir(parents=True)
        config = TextData(dataset="lm1b", domain_feature="", sequence_length=8, batch_size=4)
        pipeline = TextPipeline(config, seed=0)
        batches = pipeline.held_out_batches("test", num_batches=1)
    assert pipeline.domains == ("lm1b",)
    text = ByteTokenizer().decode(pipeline.rows(0, 0, 4)["tokens"].ravel())
    assert set(text) <= set(" abcdefghij")
    assert batches[0]["mask"].all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_length": 0}, "data.sequence_length is 0; it must be at least 1"),
        ({"batch_size": -1}, "data.batch_size is -1; it must be at least 1"),
        (
            {"domain_weights": {"fruit": 0.0}},
            r"domain_weights\['fruit'\] is 0.0; it must be a positive",
        ),
        ({"domain_weights": {"fish": 1.0}}, "names 'fish', .* its domains are fruit, metal, tree"),
        ({"domain_feature": "topic"}, "domain_feature='topic' is not a feature"),
        ({"sequence_length": 10**6}, "sequence_length=1000000 is longer than the text of every"),
    ],
)
def test_bad_fields_are_named(tiny_text, changes, message):
    with pytest.raises(UserError, match=message):
        TextPipeline(_config(tiny_text, **changes), seed=0)


def test_a_held_out_split_without_a_row(tiny_text):
    pipeline = TextPipeline(_config(tiny_text, sequence_length=5000), seed=0)
    with pytest.raises(UserError, match=r"split='test' .* has no row of sequence_length=5000"):
        pipeline.held_out_batches("test", num_batches=1)


def test_batches_have_the_shapes_that_the_config_says(tiny_text):
    config = _config(tiny_text)
    assert_batch_shapes(config, TextPipeline(config, seed=0))
