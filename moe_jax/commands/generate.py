"""Continues prompts with a trained run; a run from text to text answers them.

    python experiments/generate.py --workdir=runs/quickstart/moe --prompt='def main(' \
        [--prompt='import ' ...] [--temperature=0.8] [--top_k=40] [--max_new_tokens=200]
    python experiments/generate.py --workdir=runs/translation \
        --prompt='translate English to German: Save the file' --beams=4
    python experiments/generate.py --checkpoint=hf:PATH --mesh=expert:8 --prompt='Once upon a time'
    python experiments/generate.py --checkpoint=hf:PATH --temperature=0 \
        --prompt='A <extra_id_0> walks into a bar.'

All prompts are decoded in one batch, with a key-value cache.
"""

import json
from typing import Any

from absl import flags
from jax.sharding import Mesh

from moe_jax.data.tokenizers import Tokenizer
from moe_jax.decoding.generation import generate_texts
from moe_jax.errors import UserError
from moe_jax.interop.huggingface.loading import folder_named, load_with_tokenizer
from moe_jax.models.encoder_decoder import EncoderDecoderConfig
from moe_jax.parallel.mesh import MeshConfig, force_host_devices, make_mesh, parse_mesh
from moe_jax.training.trained import Trained

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "In place of workdir: hf:PATH, a folder of Hugging Face's."
)
_PROMPT = flags.DEFINE_multi_string("prompt", ["The "], "Text to continue; may be given again.")
_NEW = flags.DEFINE_integer(
    "max_new_tokens",
    None,
    "Tokens to add; default: as many as there is room for, at most 128.",
    lower_bound=1,
)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "Divides the logits; 0 is greedy.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Draw among the k most probable tokens; 0: all.")
_BEAMS = flags.DEFINE_integer(
    "beams", 0, "Search with so many hypotheses instead of drawing; 0: draw."
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the draws.")
_MESH = flags.DEFINE_string(
    "mesh", "", "Such as data:2,expert:4; default: the run's, or one device."
)
_FORMAT = flags.DEFINE_enum("format", "text", ["text", "json"], "What stdout gets.")


def main() -> None:
    """Generates and prints."""
    _check_flags()
    model, mesh, tokenizer = _open()
    texts = _generate(model, mesh, tokenizer)
    if _FORMAT.value == "json":
        pairs = zip(_PROMPT.value, texts, strict=True)
        print(json.dumps([{"prompt": prompt, "continuation": text} for prompt, text in pairs]))
        return
    between = "\n" if isinstance(model.config, EncoderDecoderConfig) else ""
    for prompt, text in zip(_PROMPT.value, texts, strict=True):
        print(f"{prompt}{between}{text}\n{'-' * 80}")


def _check_flags() -> None:
    if _BEAMS.value < 0:
        raise UserError(
            f"--beams is {_BEAMS.value}; it must be the number of hypotheses to search with, or 0 to "
            "draw."
        )
    for name in ("temperature", "top_k", "seed"):
        if _BEAMS.value and flags.FLAGS[name].present:
            raise UserError(
                f"beams is {_BEAMS.value}, which draws nothing, but {name} is "
                f"{flags.FLAGS[name].value}; leave one of them out."
            )


def _open() -> tuple[Any, Mesh, Tokenizer]:
    """The model with its numbers, where they are, and the tokenizer of its text."""
    if (_WORKDIR.value is None) == (_CHECKPOINT.value is None):
        raise UserError(
            f"--workdir is {_WORKDIR.value} and --checkpoint is {_CHECKPOINT.value}; give one of the two."
        )
    if _CHECKPOINT.value is not None:
        return _open_checkpoint(_CHECKPOINT.value)
    trained = Trained.load(_WORKDIR.value, _MESH.value)
    return trained.model, trained.run.mesh, trained.tokenizer


def _open_checkpoint(checkpoint: str) -> tuple[Any, Mesh, Tokenizer]:
    """The same of another library's folder, written as hf:PATH."""
    folder = folder_named(checkpoint)
    config = parse_mesh(_MESH.value, MeshConfig())
    config.validate()
    force_host_devices(config.devices_of_process)
    mesh = make_mesh(config)
    model, tokenizer = load_with_tokenizer(folder, mesh)
    return model, mesh, tokenizer


def _generate(model: Any, mesh: Mesh, tokenizer: Tokenizer) -> list[str]:
    """A text for each prompt."""
    return generate_texts(
        model,
        mesh,
        tokenizer,
        _PROMPT.value,
        _NEW.value,
        _TEMPERATURE.value,
        _TOP_K.value,
        _BEAMS.value,
        _SEED.value,
    )
