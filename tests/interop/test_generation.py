import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from etils import epath
from flax import nnx
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from moe_jax.decoding.sampling import Sampling, generate
from moe_jax.decoding.seq2seq import Frame, sample
from moe_jax.decoding.text import continue_texts
from moe_jax.dispatch.gather import Gather
from moe_jax.errors import UserError
from moe_jax.interop.huggingface.loading import load, load_with_tokenizer
from moe_jax.interop.huggingface.saving import save
from moe_jax.interop.huggingface.tokenizer import FolderTokenizer, FolderTokens
from moe_jax.parallel.mesh import MeshConfig, make_mesh
from tests.interop.folders import PARITY, config_of, weights_of, write

TEXTS = ["der Hund und die Katze", "die Katze und der Hund", "ein Hund, eine Katze"]
GREEDY = Sampling(temperature=0.0)
PROMPTS = ["die", "eine Katze und der"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny Mixtral as we save it, with a tokenizer of fewer tokens than it has outputs."""
    folder = tmp_path_factory.mktemp("hf")
    theirs = write(folder / "theirs", config_of("mixtral"), weights_of("mixtral"))
    model = load(theirs, make_mesh(MeshConfig()))
    further = {"bos_token_id": 1, "eos_token_id": 2}
    save(model, "mixtral", folder / "ours", further, max_shard_bytes=10_000)
    library = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    library.train_from_iterator(
        TEXTS * 2,
        trainers.BpeTrainer(
            vocab_size=40, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
        ),
    )
    library.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    library.save(str(folder / "ours" / "tokenizer.json"))
    return folder / "ours"


def test_a_folder_s_tokenizer(folder):
    tokenizer = FolderTokenizer.load(folder)
    assert (tokenizer.BOS, tokenizer.EOS, tokenizer.PAD) == (1, 2, 2)
    ids = tokenizer.encode("der Hund")
    assert tokenizer.decode(ids) == "der Hund"
    assert tokenizer.encode_prompt("der Hund").tolist() == [1, *ids]
    allowed = tokenizer.may_be_drawn(48)
    # transformers draws special tokens, too, and outputs beyond the tokenizer's; they are no text.
    assert allowed.all() and len(allowed) == 48
    assert tokenizer.decode([*ids, 0, 2, 47]) == "der Hund"


def test_a_batch_on_8_devices_equals_a_prompt_alone(folder):
    texts = []
    for config, prompts in (
        (MeshConfig(data=2, expert=2, model=2), PROMPTS),
        (MeshConfig(), PROMPTS[:1]),
    ):
        mesh = make_mesh(config)
        model, tokenizer = load_with_tokenizer(folder, mesh)
        # Nothing is dropped in decoding, and slots compile faster than what is dropless.
        model.config.moe.dispatch = Gather()
        texts.append(continue_texts(model, mesh, tokenizer, prompts, 8, GREEDY, seed=0))
    batch, alone = texts
    assert batch[:1] == alone
    assert batch[0] and batch[1] and batch[0] != batch[1]


def test_folders_without_what_generation_needs(folder, tmp_path):
    mesh = make_mesh(MeshConfig())
    vit = write(tmp_path / "vit", config_of("vit"), weights_of("vit"))
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        load_with_tokenizer(vit, mesh)
    (vit / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    (vit / "config.json").write_text(json.dumps(config_of("vit") | {"eos_token_id": [2, 3]}))
    with pytest.raises(UserError, match="holds a Vision, which generates no texts"):
        load_with_tokenizer(vit, mesh)
    (vit / "config.json").write_text(json.dumps(config_of("vit")))
    with pytest.raises(UserError, match="eos_token_id=None; name the token"):
        load_with_tokenizer(vit, mesh)


GENERATED = json.loads((PARITY.parents[1] / "huggingface" / "generated.json").read_text())


@pytest.mark.parametrize("name", sorted(GENERATED["models"]))
def test_tokens_are_those_of_transformers(name, tmp_path):
    """Greedily, each row of a batch of unequal prompts, until any of several ends."""
    case = GENERATED["models"][name]
    folder = write(tmp_path / name, config_of(name), weights_of(name))
    model = load(folder, make_mesh(MeshConfig()))
    tokens, mask = jnp.array(case["tokens"], jnp.int32), jnp.array(case["mask"], bool)
    assert len(set(np.sum(case["mask"], 1))) > 2
    key, count = jax.random.key(0), GENERATED["new_tokens"]
    if name in ("t5", "switch"):
        frame = Frame(begin=0, ends=tuple(GENERATED["ends"]), pad=0)
        run = nnx.jit(lambda m: sample(m, tokens, mask, key, count, GREEDY, frame=frame))
    else:
        run = nnx.jit(lambda m: generate(m, tokens, mask, key, count, GREEDY))
    for row, right in zip(np.asarray(run(model)), case["answers"], strict=True):
        assert row[: len(right)].tolist() == right
        assert len(right) == count or right[-1] in GENERATED["ends"]


def test_texts_end_at_any_of_the_ends(folder, tmp_path):
    """Of generation_config.json, which counts before config.json, or of the latter."""
    copied = tmp_path / "copied"
    shutil.copytree(folder, copied)
    mesh = make_mesh(MeshConfig())
    model, tokenizer = load_with_tokenizer(copied, mesh)
    texts = continue_texts(model, mesh, tokenizer, PROMPTS, 8, GREEDY, seed=0)
    drawn = tokenizer.encode(texts[0])[:6].tolist()
    config = json.loads((copied / "config.json").read_text())
    for ends, generation in (([2, drawn[1]], None), (2, [drawn[1], 2]), (2, drawn[1])):
        (copied / "config.json").write_text(json.dumps(config | {"eos_token_id": ends}))
        if generation is not None:
            settings = {"eos_token_id": generation, "transformers_version": "5.23.0"}
            (copied / "generation_config.json").write_text(json.dumps(settings))
        tokenizer = FolderTokenizer.load(copied)
        cut = continue_texts(model, mesh, tokenizer, PROMPTS[:1], 8, GREEDY, seed=0)[0]
        assert len(cut) < len(texts[0]) and texts[0].startswith(cut)


@pytest.mark.parametrize(
    "config, generation, message",
    [
        (
            {"eos_token_id": 48},
            {},
            "eos_token_id=48, which is no token of the model; its tokens are 0",
        ),
        ({"eos_token_id": -1}, {}, "config.json has eos_token_id=-1, which is no token"),
        ({"eos_token_id": [2, "3"]}, {}, "eos_token_id='3', which is no token"),
        ({"eos_token_id": []}, {}, "name the token that ends a text"),
        ({"eos_token_id": 2}, {"eos_token_id": 99}, r"generation_config.json has eos_token_id=99"),
        ({"eos_token_id": 2, "bos_token_id": 99}, {}, "bos_token_id=99, which is no token"),
        ({"eos_token_id": 2, "pad_token_id": "x"}, {}, "pad_token_id='x', which is no token"),
    ],
)
def test_special_tokens_that_cannot_be(folder, config, generation, message):
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    with pytest.raises(UserError, match=message):
        FolderTokenizer(library, "name", {"vocab_size": 48, **config}, generation)


def test_padding_that_is_no_token(folder):
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for pad in (-1, 48, None):
        hf = {"vocab_size": 48, "eos_token_id": [5, 6], "pad_token_id": pad}
        tokenizer = FolderTokenizer(library, "name", hf)
        assert (tokenizer.PAD, tokenizer.EOS, tokenizer.ends) == (5, 5, (5, 6))


def test_a_prompt_of_another_model_s_tokens(folder, tmp_path):
    """Tokens that the model's table lacks would be those of its last row."""
    copied = tmp_path / "copied"
    shutil.copytree(folder, copied)
    library = tokenizers.Tokenizer.from_file(str(copied / "tokenizer.json"))
    library.add_tokens([f"<{i}>" for i in range(20)])
    library.save(str(copied / "tokenizer.json"))
    mesh = make_mesh(MeshConfig())
    model, tokenizer = load_with_tokenizer(copied, mesh)
    with pytest.raises(UserError, match=r"a prompt has token \d+, but model.vocab_size is 48"):
        continue_texts(model, mesh, tokenizer, ["die <19>"], 2, GREEDY, seed=0)


def test_tokenizers_of_one_name_are_told_apart(folder, tmp_path):
    """Texts that are packed in the tokens of one are not taken for those of the other."""
    copied = tmp_path / folder.name
    shutil.copytree(folder, copied)
    assert FolderTokenizer.load(copied).name == FolderTokenizer.load(folder).name
    library = tokenizers.Tokenizer.from_file(str(copied / "tokenizer.json"))
    library.add_tokens(["Maus"])
    library.save(str(copied / "tokenizer.json"))
    assert FolderTokenizer.load(copied).name != FolderTokenizer.load(folder).name
    tokens = FolderTokens(folder=str(folder))
    assert tokens.vocab_size == FolderTokenizer.load(folder).vocab_size
    assert tokens.train([], "corpus", tmp_path).name == tokens.load(epath.Path(tmp_path)).name
