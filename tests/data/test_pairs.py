"""Rows of translations."""

import collections
import dataclasses

import numpy as np
import pytest
import tensorflow_datasets as tfds

from moe_jax.data.pairs import INSTRUCTION, LANGUAGE_NAMES, PairData, PairPipeline
from moe_jax.data.subword_tokenizer import Subword
from moe_jax.data.tokenizers import ByteTokenizer
from moe_jax.decoding.seq2seq import encode_input
from moe_jax.errors import UserError
from tests.data.shapes import assert_batch_shapes

BOS, EOS, PAD = ByteTokenizer.BOS, ByteTokenizer.EOS, ByteTokenizer.PAD


class TinyTranslations(tfds.core.GeneratorBasedBuilder):
    """Numbers in three languages; French lacks the odd ones, and one German text is long."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.Translation(["en", "de", "fr"])
        )

    def _split_generators(self, dl_manager):
        return {"train": self._texts(0, 40), "validation": self._texts(40, 50)}

    def _generate_examples(self):
        raise NotImplementedError

    def _texts(self, start, stop):
        for number in range(start, stop):
            french = "" if number % 2 else f"le numéro {number}"
            german = "eine sehr lange Zahl" if number == 3 else f"die Zahl {number}"
            yield number, {"en": f"number {number}", "de": german, "fr": french}


@pytest.fixture(scope="session")
def tiny_translations(tmp_path_factory):
    builder = TinyTranslations(
        data_dir=str(tmp_path_factory.mktemp("datasets")), file_format="array_record"
    )
    builder.download_and_prepare()
    return str(builder.data_path)


@pytest.fixture
def config(tiny_translations):
    return PairData(
        dataset=tiny_translations,
        pairs=("en-de", "fr-en"),
        instruction=False,
        input_length=16,
        target_length=14,
        batch_size=8,
    )


def _texts(pipeline, batch):
    decode = pipeline.tokenizer.decode
    return [
        (pipeline.domains[domain], decode(inputs), decode(targets))
        for inputs, targets, domain in zip(
            batch["inputs"], batch["targets"], batch["domain"], strict=True
        )
    ]


def test_an_epoch_is_every_translation_that_fits(config):
    pipeline = config.open(0)
    assert pipeline.rows_per_epoch == 39 + 20
    expected = [("en-de", f"number {n}", f"die Zahl {n}") for n in range(40) if n != 3]
    expected += [("fr-en", f"le numéro {n}", f"number {n}") for n in range(0, 40, 2)]
    read = []
    for step in range(8):
        stop = min(8, 59 - 8 * step)
        read += _texts(pipeline, pipeline.rows(step, 0, stop))
    assert collections.Counter(read) == collections.Counter(expected)
    assert read != sorted(read)


def test_rows_are_a_function_of_seed_and_step(config):
    first, again, other = config.open(5), config.open(5), config.open(6)
    whole = first.rows(3, 0, 8)
    np.testing.assert_array_equal(whole["inputs"][2:6], again.rows(3, 2, 6)["inputs"])
    assert _texts(first, whole) != _texts(other, other.rows(3, 0, 8))


def test_the_form_of_a_row(config):
    pipeline = config.open(0)
    rows, encode = pipeline.open_split("train")["fr-en"], pipeline.tokenizer.encode
    source, target = encode("le numéro 2"), encode("number 2")
    (row,) = (row for row in rows if row["targets"].tolist()[1:10] == [*target, EOS])
    assert row["inputs"].dtype == row["targets"].dtype == np.int32
    assert row["inputs"].tolist() == [*source, EOS] + [PAD] * (16 - len(source) - 1)
    assert row["targets"].tolist() == [BOS, *target, EOS] + [PAD] * (15 - len(target) - 2)


def test_instructions_say_what_is_wanted(config):
    config.instruction = True
    with pytest.raises(UserError, match="no translation of at most input_length=16 and target_le"):
        config.open(0)
    config.input_length = 42
    rows = config.open(0).open_split("train")["fr-en"]
    # "le numéro 10" has one byte too many.
    assert (len(rows), rows.dropped) == (5, 15)
    assert {ByteTokenizer().decode(row["inputs"]) for row in rows} == {
        f"translate French to English: le numéro {number}" for number in range(0, 10, 2)
    }


def test_a_prompt_has_the_tokens_of_a_row(config, tmp_path):
    """Also where a subword of the whole text would span the instruction's end."""
    config.instruction, config.input_length = True, 64
    texts = [config.instruction_of("en-de") + f"number {n}" for n in range(40)]
    tokenizer = Subword(vocab_size=300).train(texts, "corpus", tmp_path)
    row = PairPipeline(config, 0, tokenizer).open_split("train")["en-de"][0]["inputs"]
    prompt = tokenizer.decode(row)
    assert prompt in texts
    np.testing.assert_array_equal(encode_input(tokenizer, prompt), row[row != PAD])
    assert row[row != PAD].tolist() != [*tokenizer.encode(prompt), EOS]


def test_every_instruction_is_found_in_a_prompt():
    data = PairData()
    for language in LANGUAGE_NAMES:
        instruction = data.instruction_of(f"en-{language}")
        found = INSTRUCTION.match(instruction + "translate a to b: c")
        assert found and found[0] == instruction


def test_a_split_without_an_example_is_refused(config, monkeypatch):
    pipeline, opened = config.open(0), config.open_dataset("validation")
    empty = dataclasses.replace(opened, examples=[])
    monkeypatch.setattr(PairData, "open_dataset", lambda config, split: empty)
    with pytest.raises(UserError, match=r"split='validation' .* has no translation of at most"):
        pipeline.held_out_batches("validation", 1)
    with pytest.raises(UserError, match=r"the training split .* has no translation of at most"):
        config.open(0)


def test_held_out_rows(config):
    pipeline = config.open(0)
    batches = pipeline.held_out_batches("validation", 5)
    assert len(batches) == 2
    assert [int(batch["mask"].sum()) for batch in batches] == [8, 7]
    assert not batches[1]["inputs"][7].any() and not batches[1]["targets"][7].any()
    domains = np.concatenate([batch["domain"][batch["mask"]] for batch in batches])
    assert np.bincount(domains).tolist() == [10, 5]


def test_the_record_counts_what_is_predicted(config):
    pipeline = config.open(0)
    record = pipeline.record()
    assert record["train_rows"] == 59 and record["dropped_rows"] == 1
    targets = np.concatenate(
        [row["targets"][1:] for rows in pipeline.open_split("train").values() for row in rows]
    )
    _, counts = np.unique(targets[targets != PAD], return_counts=True)
    assert record["train_tokens"] == counts.sum()
    shares = counts / counts.sum()
    assert record["trivial_loss"] == pytest.approx(-(shares * np.log(shares)).sum())


def test_a_subword_vocabulary_of_all_languages(config):
    config.tokenizer = Subword(vocab_size=300)
    pipeline = config.open(0)
    (row,) = pipeline.rows(0, 0, 1)["inputs"]
    assert len(pipeline.tokenizer.encode("number die Zahl le numéro")) < 10
    assert pipeline.tokenizer.decode(row) in {
        text for _, text, _ in _texts(pipeline, pipeline.rows(0, 0, 1))
    }


def test_weights_choose_pairs(config):
    config.domain_weights = {"fr-en": 1.0}
    pipeline = config.open(0)
    assert {pair for pair, _, _ in _texts(pipeline, pipeline.rows(0, 0, 8))} == {"fr-en"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pairs": ()}, "data.pairs is empty"),
        ({"pairs": ("german",)}, "data.pairs has 'german'; it must be two languages"),
        ({"pairs": ("en-en",)}, "data.pairs has 'en-en'; it must be two languages"),
        ({"pairs": ("en-xx",), "instruction": True}, "no instruction can name the language 'xx'"),
        (
            {"pairs": ("en-it",)},
            "data.pairs has the language 'it', which .* lacks; it has de, en, fr",
        ),
        ({"input_length": 1}, "data.input_length is 1; it must be at least 2"),
        ({"target_length": 0}, "data.target_length is 0; it must be at least 2"),
    ],
)
def test_bad_fields_are_named(config, changes, message):
    for field, value in changes.items():
        setattr(config, field, value)
    with pytest.raises(UserError, match=message):
        config.open(0)


def test_batches_have_the_shapes_that_the_config_says(config):
    assert_batch_shapes(config, config.open(0))
