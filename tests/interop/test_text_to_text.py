"""Encoder-decoder folders of Hugging Face's in generate.py and evaluate.py."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from flax import nnx

from moe_jax.data.pairs import PairData, PairPipeline
from moe_jax.data.span_corruption import SpanCorruptionData
from moe_jax.decoding.generation import generate_texts
from moe_jax.decoding.seq2seq import encode_input
from moe_jax.errors import UserError
from moe_jax.interop.huggingface.loading import load, load_with_tokenizer
from moe_jax.interop.huggingface.saving import save
from moe_jax.interop.huggingface.tokenizer import FolderTokenizer, FolderTokens
from moe_jax.layers.mode import Mode
from moe_jax.parallel.mesh import MeshConfig, make_mesh
from tests.interop.folders import PARITY, config_of, weights_of, write, write_words
from tests.scripts import script

GENERATED = json.loads((PARITY.parents[1] / "huggingface" / "generated.json").read_text())
# T5's order: padding, end, unknown, text, and the sentinels downwards at the end.
WORDS = [
    "def",
    "return",
    "if",
    "the",
    "of",
    "import",
    "import",
    "for",
    "in",
    "self",
    "a",
    "b",
    "c",
    "x",
    "y",
    "z",
    "number",
    "die",
    "Zahl",
    "translate",
]
TEXT = [f"{word}{n}" for n, word in enumerate(WORDS)]
TOKENS = ["<pad>", "</s>", "<unk>", *TEXT, *(f"<extra_id_{n}>" for n in reversed(range(10)))]


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    """A folder of each family whose words are its tokens' numbers, with the ends of generated.json."""
    folders = {}
    for name in ("t5", "switch"):
        config = config_of(name) | {"eos_token_id": GENERATED["ends"]}
        folder = tmp_path_factory.mktemp("numbers") / name
        folders[name] = write(folder, config, weights_of(name))
        write_words(folder, [*map(str, range(47)), "<unk>"])
    return folders


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Switch with a tokenizer like T5's."""
    folder = tmp_path_factory.mktemp("hf") / "switch"
    write(folder, config_of("switch"), weights_of("switch"))
    write_words(folder, TOKENS, end="</s>")
    return folder


def prompts_and_answers(name):
    """What transformers was given, and what it generated greedily up to an end, as words."""
    case = GENERATED["models"][name]
    prompts = [
        " ".join(str(token) for token, real in zip(tokens, mask, strict=True) if real)
        for tokens, mask in zip(case["tokens"], case["mask"], strict=True)
    ]
    answers = [[t for t in answer if t not in GENERATED["ends"]] for answer in case["answers"]]
    return prompts, [" ".join(map(str, answer)) for answer in answers]


@pytest.mark.parametrize("name", ["t5", "switch"])
def test_the_script_prints_what_transformers_generates(name, numbers):
    prompts, answers = prompts_and_answers(name)
    arguments = [f"--prompt={prompt}" for prompt in prompts]
    count = f"--max_new_tokens={GENERATED['new_tokens']}"
    done = script(
        "generate", f"--checkpoint=hf:{numbers[name]}", "--temperature=0", count, "--format=json",
        "--mesh=data:2", *arguments,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [pair["continuation"] for pair in json.loads(done.stdout)] == answers


@pytest.mark.parametrize("name", ["t5", "switch"])
def test_one_beam_is_greedy_and_ends_at_any_end(name, numbers):
    mesh = make_mesh(MeshConfig())
    model, tokenizer = load_with_tokenizer(numbers[name], mesh)
    prompts, answers = prompts_and_answers(name)
    assert generate_texts(model, mesh, tokenizer, prompts, 12, beams=1) == answers
    assert len(generate_texts(model, mesh, tokenizer, prompts, 12, beams=3)) == len(prompts)


def test_an_end_that_is_also_padding_is_read(numbers, tmp_path):
    """A folder may name no padding; the ends of its inputs are no padding then."""
    mesh = make_mesh(MeshConfig())
    prompts = ["27 15 10 37 1 1", "27 15 1"]
    texts = []
    for pad in (None, 0):
        config = config_of("t5") | {"pad_token_id": pad}
        folder = write(tmp_path / str(pad), config, weights_of("t5"))
        write_words(folder, [*map(str, range(47)), "<unk>"])
        model, tokenizer = load_with_tokenizer(folder, mesh)
        assert (1 if pad is None else pad, 1) == (tokenizer.PAD, tokenizer.EOS)
        texts.append(generate_texts(model, mesh, tokenizer, prompts, 6, temperature=0))
    assert texts[0] == texts[1]


def test_sentinels_are_read_and_written(folder):
    tokenizer = FolderTokenizer.load(folder)
    assert (tokenizer.BOS, tokenizer.EOS, tokenizer.PAD, tokenizer.extra_ids) == (0, 1, 0, 10)
    ids = encode_input(tokenizer, "a10 <extra_id_0> b11 <extra_id_1>")
    last = len(TOKENS) - 1
    assert ids.tolist() == [TOKENS.index("a10"), last, TOKENS.index("b11"), last - 1, 1]
    assert ids.dtype == np.int32
    assert tokenizer.decode([0, last, *ids[:1], 2, 1, 0]) == "<extra_id_0> a10"


def test_sentinels_may_be_in_any_order(folder, tmp_path, spans):
    """The released T5 counts them down, tokenizers that transformers 5 makes count up."""
    up = [*TOKENS[:-10], *(f"<extra_id_{n}>" for n in range(10))]
    copied = write(tmp_path / "x", config_of("switch"), weights_of("switch"))
    write_words(copied, up, end="</s>")
    tokens = FolderTokens(folder=str(copied), extra_ids=10)
    for read in (spans, dataclasses.replace(spans, tokenizer=tokens)):
        pipeline = read.open(0)
        text = pipeline.tokenizer.decode(pipeline.rows(0, 0, 1)["targets"][0])
        assert [w for w in text.split() if w.startswith("<")] == ["<extra_id_0>"]


def test_a_folder_that_we_saved_has_its_family_s_end(folder, tmp_path):
    """config.json need not name what is transformers' default for the family."""
    save(load(folder, make_mesh(MeshConfig())), "switch_transformers", tmp_path / "ours")
    assert "eos_token_id" not in json.loads((tmp_path / "ours" / "config.json").read_text())
    (tmp_path / "ours" / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    tokenizer = FolderTokenizer.load(tmp_path / "ours")
    assert (tokenizer.BOS, tokenizer.EOS, tokenizer.PAD) == (0, 1, 0)


@pytest.mark.parametrize("start", [None, "missing"])
def test_what_a_target_begins_with_must_be_named(start, folder, tmp_path):
    config = config_of("switch") | {"decoder_start_token_id": start}
    if start == "missing":
        del config["decoder_start_token_id"], config["is_encoder_decoder"]
    copied = write(tmp_path / "x", config, weights_of("switch"))
    (copied / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    with pytest.raises(
        UserError, match=r"decoder_start_token_id=None; name the token that targets"
    ):
        FolderTokenizer.load(copied)


class WordPairs(tfds.core.GeneratorBasedBuilder):
    """Words of `TOKENS` in two languages; the split `framed` has an end in a text."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.Translation(["en", "de"]))

    def _split_generators(self, dl_manager):
        return {
            "train": self._texts(0, 100, ""),
            "validation": self._texts(100, 160, ""),
            "framed": self._texts(0, 10, " </s>"),
        }

    def _generate_examples(self):
        raise NotImplementedError

    def _texts(self, start, stop, end):
        for number in range(start, stop):
            word = TEXT[number % len(TEXT)]
            yield number, {"en": f"number16 {word} a10{end}", "de": f"die17 Zahl18 {word}"}


@pytest.fixture(scope="module")
def pairs(folder, tmp_path_factory):
    builder = WordPairs(
        data_dir=str(tmp_path_factory.mktemp("datasets")), file_format="array_record"
    )
    builder.download_and_prepare()
    return PairData(
        dataset=str(builder.data_path),
        tokenizer=FolderTokens(folder=str(folder), extra_ids=10),
        input_length=10,
        target_length=5,
        batch_size=8,
    )


@pytest.fixture(scope="module")
def spans(pairs):
    return SpanCorruptionData(
        dataset=pairs.dataset,
        text_feature="en",
        domain_feature="",
        tokenizer=pairs.tokenizer,
        input_length=24,
        batch_size=8,
    )


def test_translations_have_the_tokens_of_the_folder(folder, pairs):
    """An input is what transformers' tokenizer makes of instruction and sentence."""
    tokenizer = FolderTokenizer.load(folder)
    rows = PairPipeline(pairs, 0).open_split("train")["en-de"]
    read = {(*row["inputs"].tolist(), *row["targets"].tolist()) for row in rows}
    expected = set()
    for word in TEXT:
        inputs = encode_input(tokenizer, f"translate English to German: number16 {word} a10")
        targets = [0, *tokenizer.encode(f"die17 Zahl18 {word}"), 1, 0]
        expected.add((*inputs.tolist(), *[0] * (10 - len(inputs)), *targets))
    assert len(rows) == 100 and read == expected


def test_corrupted_spans_have_the_frame_and_the_sentinels_of_the_folder(spans):
    batch = spans.open(0).rows(0, 0, 8)
    first = len(TOKENS) - 1
    assert (batch["targets"][:, 0] == 0).all() and (batch["targets"][:, 1] == first).all()
    assert (batch["targets"][:, -1] == 1).all() and (batch["inputs"][:, -1] == 1).all()
    assert ((batch["inputs"] == first).sum(axis=1) == 1).all()


@pytest.mark.parametrize("kind", ["spans", "pairs"])
def test_evaluate_a_folder(kind, folder, request):
    data = request.getfixturevalue(kind)
    config = {"spans": "encoder_decoder", "pairs": "translation"}[kind]
    fields = {
        "dataset": data.dataset, "input_length": data.input_length, "batch_size": 8,
        **({"domain_feature": "", "text_feature": "en"} if kind == "spans" else
           {"target_length": data.target_length, "pairs": "('en-de',)"}),
    }  # fmt: skip
    done = script(
        "evaluate", f"--checkpoint=hf:{folder}", f"--config=configs/tiny/{config}.py",
        *(f"--config.data.{name}={value}" for name, value in fields.items()),
        "--config.evaluation.batches=2", "--mesh=data:2,expert:2", "--format=json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    model = load(folder, make_mesh(MeshConfig()))
    batches = data.open(0).held_out_batches("validation", 2)
    assert result["batches"] == len(batches)
    losses = np.concatenate([target_losses(model, batch) for batch in batches])
    assert result["eval/loss"] == pytest.approx(float(np.mean(losses)), rel=1e-4)


def target_losses(model, batch):
    """The cross-entropy of every target that is no padding, from the logits."""

    def logits(model, inputs, targets):
        return model(inputs, inputs != 0, targets, None, Mode.DECODE)[0]

    inputs, targets = jnp.array(batch["inputs"]), jnp.array(batch["targets"])
    log = jax.nn.log_softmax(nnx.jit(logits)(model, inputs, targets[:, :-1]))
    each = -np.take_along_axis(np.asarray(log), batch["targets"][:, 1:, None], axis=-1)[..., 0]
    return each[batch["targets"][:, 1:] != 0]


def test_an_end_inside_of_a_text_is_refused(pairs):
    """It would shift all sentences after it to the other language."""
    with pytest.raises(UserError, match="a text of the dataset has the token 0 or 1 of the token"):
        dataclasses.replace(pairs, train_split="framed").open(0)
