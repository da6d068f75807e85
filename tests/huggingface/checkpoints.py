"""Writes the checkpoints of cases with transformers, and asks it what they answer.

    python tests/huggingface/checkpoints.py ROOT     in each folder of ROOT: reads ours/ and asked.npz,
                                                     writes answer.npz, or why there is none

Runs with transformers 5 and, to read what moe_jax wrote, with 4.57; needs torch, not moe_jax.
"""

import json
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

Arrays = dict[str, np.ndarray]
Weights = dict[str, torch.Tensor]

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_HEAD, _EMBEDDED, _SHARED = "lm_head.weight", "model.embed_tokens.weight", "shared.weight"
_STACKS = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_ARCHITECTURES = {
    "mixtral": "MixtralForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "t5": "T5ForConditionalGeneration",
    "switch_transformers": "SwitchTransformersForConditionalGeneration",
    "vit": "ViTForImageClassification",
}


class UnansweredError(Exception):
    """transformers does not open a folder, or makes up a part of it."""


def write(
    folder: pathlib.Path, family: str, arguments: dict[str, Any], seed: int, **how: Any
) -> None:
    """A checkpoint of random numbers as `save_pretrained` writes it.

    Args:
      folder: where.
      family: the `model_type`.
      arguments: of the config.
      seed: of the numbers.
      how: `original_format` and `shards`, see `Case`.
    """
    kind = getattr(transformers, _ARCHITECTURES[family])
    model = kind(kind.config_class(**arguments)).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not tensor.is_floating_point() or "inv_freq" in name:
            continue
        draw = torch.randn(tensor.shape, generator=generator)
        scale = 1.0 if "embed_tokens" in name or "shared.weight" in name else 0.25
        tensor.data.copy_(1 + 0.25 * draw if "norm" in name and "weight" in name else scale * draw)
    model.save_pretrained(
        folder,
        save_original_format=how["original_format"],
        max_shard_size=20_000 if how["shards"] else "5GB",
    )


def change(folder: pathlib.Path, fields: dict[str, Any], tensors: list[str], seed: int) -> None:
    """Changes config.json and the files as `Case` says."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for name, value in fields.items():
        config.pop(name, None)
        if value is not None:
            config[name] = None if value == "null" else value
    path.write_text(json.dumps(config))
    for name in tensors:
        if name in _OF_FILES:
            _OF_FILES[name](folder)
            continue
        weights = _all(folder)
        _OF_WEIGHTS[name](weights, torch.Generator().manual_seed(seed + 1))
        for file in _files(folder):
            file.unlink()
        (folder / _INDEX).unlink(missing_ok=True)
        save_file(weights, folder / _SINGLE, metadata={"format": "pt"})


def inputs(config: dict[str, Any], length: int, seed: int) -> Arrays:
    """What the models are asked, by the names of transformers' arguments."""
    draw = np.random.default_rng(seed)
    if config["model_type"] == "vit":
        side = config["image_size"]
        side = side if isinstance(side, int) else side[0]
        shape = (2, config["num_channels"], side, side)
        return {"pixel_values": draw.normal(size=shape).astype(np.float32)}
    tokens = draw.integers(1, config["vocab_size"], (2, length))
    mask = np.ones((2, length), np.int64)
    if "d_model" not in config:
        mask[1, :3] = 0
        return {"input_ids": tokens, "attention_mask": mask}
    mask[1, -2:] = 0
    targets = draw.integers(1, config["vocab_size"], (2, length))
    targets[:, 0] = 0
    return {"input_ids": tokens, "attention_mask": mask, "decoder_input_ids": targets}


def logits(folder: pathlib.Path, asked: Arrays) -> np.ndarray:
    """What transformers answers.

    Raises:
      UnansweredError: it does not open the folder, or draws a part of it at random.
    """
    try:
        family = json.loads((folder / "config.json").read_text())["model_type"]
        kind = getattr(transformers, _ARCHITECTURES[family])
        model, info = kind.from_pretrained(
            folder, attn_implementation="eager", torch_dtype=torch.float32, output_loading_info=True
        )
        missing = [n for n in info["missing_keys"] if model.get_parameter(n).numel()]
        if missing:
            raise UnansweredError(f"has no {missing[0]}")
        with torch.no_grad():
            arguments = {name: torch.as_tensor(value) for name, value in asked.items()}
            return model.eval()(**arguments).logits.numpy()
    except UnansweredError:
        raise
    except Exception as error:  # Whatever it says, it gives no answer.
        raise UnansweredError(f"{type(error).__name__}: {error}") from error


def _files(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    return iter(sorted(folder.glob("*.safetensors")))


def _all(folder: pathlib.Path) -> Weights:
    return {name: a for file in _files(folder) for name, a in load_file(file).items()}


def _table(weights: Weights) -> str:
    return next(name for name in (_EMBEDDED, _SHARED, *_STACKS) if name in weights)


def _other(weights: Weights, name: str, generator: torch.Generator) -> None:
    weights[name] = torch.randn(weights[_table(weights)].shape, generator=generator)


def _other_head(weights: Weights, generator: torch.Generator) -> None:
    _other(weights, _HEAD, generator)


def _equal_head(weights: Weights, _: torch.Generator) -> None:
    weights[_HEAD] = weights[_table(weights)].clone()


def _no_head(weights: Weights, _: torch.Generator) -> None:
    weights.pop(_HEAD, None)


def _only_head(weights: Weights, _: torch.Generator) -> None:
    weights[_HEAD] = weights.pop(_table(weights)).clone()


def _no_shared(weights: Weights, _: torch.Generator) -> None:
    table = weights.pop(_SHARED, None)
    if table is not None:
        for name in _STACKS:
            weights.setdefault(name, table.clone())


def _other_encoder_table(weights: Weights, generator: torch.Generator) -> None:
    _other(weights, _STACKS[0], generator)


def _other_tables(weights: Weights, generator: torch.Generator) -> None:
    for name in (*_STACKS, _HEAD):
        _other(weights, name, generator)


def _further_token_layer(weights: Weights, generator: torch.Generator) -> None:
    """A layer after the last, as DeepSeek-V3's release has it."""
    layers = {int(name.split(".")[2]) for name in weights if name.startswith("model.layers.")}
    last, after = f"model.layers.{max(layers)}.", f"model.layers.{max(layers) + 1}."
    further = {n.replace(last, after): a.clone() for n, a in weights.items() if n.startswith(last)}
    width = weights[_table(weights)].shape[1]
    further[f"{after}eh_proj.weight"] = torch.randn((width, 2 * width), generator=generator)
    further[f"{after}enorm.weight"] = torch.ones(width)
    weights |= further


def _stale_index(folder: pathlib.Path) -> None:
    """A single file, and an index of files that are no longer there."""
    weights = _all(folder)
    for file in list(_files(folder)):
        file.unlink()
    save_file(weights, folder / _SINGLE, metadata={"format": "pt"})
    names = dict.fromkeys(weights, "model-00001-of-00002.safetensors")
    (folder / _INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))


def _duplicate_in_shards(folder: pathlib.Path) -> None:
    """A tensor in two files, the one that the index names being the last."""
    weights = _all(folder)
    for file in list(_files(folder)):
        file.unlink()
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    twice, moved = min(weights), max(weights)
    other = {moved: weights.pop(moved), twice: torch.zeros_like(weights[twice])}
    save_file(other, folder / first, metadata={"format": "pt"})
    save_file(weights, folder / second, metadata={"format": "pt"})
    names = dict.fromkeys(weights, second) | {moved: first}
    (folder / _INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))


_OF_WEIGHTS: dict[str, Callable[[Weights, torch.Generator], None]] = {
    "other_head": _other_head,
    "equal_head": _equal_head,
    "no_head": _no_head,
    "only_head": _only_head,
    "no_shared": _no_shared,
    "other_encoder_table": _other_encoder_table,
    "other_tables": _other_tables,
    "further_token_layer": _further_token_layer,
}
_OF_FILES: dict[str, Callable[[pathlib.Path], None]] = {
    "stale_index": _stale_index,
    "duplicate_in_shards": _duplicate_in_shards,
}


def main(root: pathlib.Path) -> None:
    """Answers for all folders."""
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for asked in sorted(root.glob("*/asked.npz")):
        try:
            answer = logits(asked.parent / "ours", dict(np.load(asked)))
        except UnansweredError as error:
            (asked.parent / "unanswered").write_text(str(error))
        else:
            np.savez(asked.parent / "answer.npz", logits=answer)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
