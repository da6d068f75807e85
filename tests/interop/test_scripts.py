"""experiments/evaluate.py and generate.py with a Hugging Face folder."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tokenizers
from flax import nnx
from tokenizers import decoders, models, pre_tokenizers, trainers

from moe_jax.interop.huggingface.loading import load
from moe_jax.interop.huggingface.tokenizer import FolderTokens
from moe_jax.layers.mode import Mode
from moe_jax.parallel.mesh import MeshConfig, make_mesh
from tests.interop.folders import config_of, weights_of, write
from tests.scripts import script
from tests.tiny import tiny_config

CONFIG = [
    "--config=configs/quickstart.py",
    "--config.data.sequence_length=32",
    "--config.data.batch_size=16",
    "--config.evaluation.batches=2",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "model"
    write(folder, config_of("mixtral") | {"eos_token_id": [2, 5]}, weights_of("mixtral"))
    library = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    library.train_from_iterator(
        ["def f(x): return x + 1"] * 4,
        trainers.BpeTrainer(vocab_size=40, special_tokens=special, show_progress=False),
    )
    library.save(str(folder / "tokenizer.json"))
    return folder


def test_evaluate_a_folder_on_a_config_s_data(folder, data_dir):
    arguments = [f"--checkpoint=hf:{folder}", *CONFIG, f"--config.data.data_dir={data_dir}"]
    done = script("evaluate", *arguments, "--format=json", "--mesh=data:2,expert:2")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["checkpoint"] == str(folder) and result["split"] == "validation"

    # The mean cross-entropy of the same rows, in the folder's tokens.
    model = load(folder, make_mesh(MeshConfig()))
    data = dataclasses.replace(
        tiny_config(str(data_dir)).data, tokenizer=FolderTokens(folder=str(folder))
    )
    batches = data.open(0).held_out_batches("validation", 2)
    logits = nnx.jit(lambda model, tokens: model(tokens, None, Mode.DECODE)[0])
    losses = []
    for batch in batches:
        log = jax.nn.log_softmax(logits(model, batch["tokens"][:, :-1]))
        losses.append(-np.take_along_axis(np.asarray(log), batch["tokens"][:, 1:, None], axis=-1))
    assert result["eval/loss"] == pytest.approx(float(np.mean(losses)), rel=1e-4)


def test_generate_until_an_end(folder):
    arguments = [f"--checkpoint=hf:{folder}", "--prompt=def", "--temperature=0"]
    done = script("generate", *arguments, "--max_new_tokens=3", "--format=json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[0]["prompt"] == "def"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--workdir is None and --checkpoint is None; give one of the two."),
        (["--checkpoint=hf:x"], "such as --config=configs/quickstart.py."),
        (["--checkpoint=hf:x", "--routing"], "but --routing writes to a run's folder"),
        (["--checkpoint=hf:/nowhere", *CONFIG], "/nowhere has no readable config.json"),
    ],
)
def test_evaluate_refuses_what_does_not_fit(arguments, message):
    done = script("evaluate", *arguments)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr.splitlines()[-1]
