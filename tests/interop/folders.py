"""Folders as transformers wrote them, of the tiny models in tests/parity/models."""

import json
import pathlib

import numpy as np
import tokenizers
from safetensors.numpy import save_file
from tokenizers import models, pre_tokenizers, processors

PARITY = pathlib.Path(__file__).parents[1] / "parity" / "models"
MODELS = [path.stem for path in sorted(PARITY.glob("*.npz"))]


def config_of(name):
    with np.load(PARITY / f"{name}.npz") as file:
        return json.loads(str(file["config"]))


def weights_of(name):
    with np.load(PARITY / f"{name}.npz") as file:
        return {
            key.removeprefix("weights/"): file[key]
            for key in file.files
            if key.startswith("weights/")
        }


def write(folder, config, weights):
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_words(folder, tokens, end=None):
    """A tokenizer.json of whole words, as T5's reads texts: sentinels are words, and `end` follows."""
    library = tokenizers.Tokenizer(models.WordLevel({t: n for n, t in enumerate(tokens)}, "<unk>"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [t for t in tokens if t in ("<pad>", "</s>", "<unk>") or t.startswith("<extra_id_")]
    library.add_special_tokens(special)
    if end:
        library.post_processor = processors.TemplateProcessing(
            single=f"$A {end}", special_tokens=[(end, tokens.index(end))]
        )
    library.save(str(folder / "tokenizer.json"))
