"""Writes what tiny models of Hugging Face `transformers` compute, for test_models.py to compare with.

    python tests/parity/models/generate.py                  write the .npz files beside this script
    python tests/parity/models/generate.py --output=DIR     write them elsewhere
    python tests/parity/models/generate.py --check          write nothing; fail if they are outdated

Needs torch and transformers (the extra `parity`); the test needs only the files.

Axis letters: B rows, L tokens per row, M tokens of an encoder's input, V vocabulary or classes.
Every file holds one model's config.json and its checkpoint as `save_pretrained` writes them, inputs,
and what the model answers:

  metadata            json: seed and the versions of python, numpy, torch and transformers
  config              json: config.json
  weights/NAME        float32, each tensor of the checkpoint by its name there
  logits              float32 [B, L, V], of an image model [B, V]
  gradients/NAME      where the function says so: of the mean cross-entropy, by the same names

Decoders: tokens [B, L] int64, mask [B, L] bool, False for padding; logits are compared where it is
True. The loss is over the real tokens that follow a real one.
Encoder-decoders: inputs [B, M], mask [B, M], decoder_inputs [B, L], targets [B, L].
Image models: images [B, channels, height, width].
"""

import argparse
import json
import pathlib
import platform
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file
from torch.nn.functional import cross_entropy

SEED = 2
B, L, M, V, D = 2, 12, 10, 48, 16
HERE = pathlib.Path(__file__).parent
Arrays = dict[str, Any]

# What the decoders share.
DECODER = {
    "vocab_size": V, "hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "attn_implementation": "eager",
}  # fmt: skip
ROUTERS = ("TopKRouter", "TopkRouter", "Top1Router")


def randomize(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Every number of the model anew, of few binary digits, so that the files are small."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not tensor.is_floating_point() or "inv_freq" in name:
            continue
        draw = torch.randn(tensor.shape, generator=generator)
        if "norm" in name and "weight" in name:
            value = 1 + 0.25 * draw
        else:  # Tokens as different as T5's, so that they go to different experts.
            value = (1.0 if "embed_tokens" in name or "shared.weight" in name else 0.25) * draw
        tensor.data.copy_((value * 64).round() / 64)


def assert_clear(model: torch.nn.Module, choices: int) -> None:
    """Makes every router refuse tokens whose chosen experts hang on a rounding."""

    def check(module: torch.nn.Module, _: Any, output: Any) -> None:
        logits = output[2] if "Switch" in type(module).__name__ else output[0]
        scores = logits.sigmoid() if hasattr(module, "e_score_correction_bias") else logits
        scores = scores + getattr(module, "e_score_correction_bias", 0.0)
        largest = scores.sort(dim=-1, descending=True).values
        # Groups make any neighbours matter.
        grouped = (getattr(module, "num_group", None) or 1) > 1
        counted = largest if grouped else largest[..., : choices + 1]
        gap = -counted.diff(dim=-1).max().item()
        assert gap > 1e-4, f"two scores differ by {gap} only; take another SEED"

    routers = [m for m in model.modules() if type(m).__name__.endswith(ROUTERS)]
    for router in routers:
        router.register_forward_hook(check)
    assert routers or not choices


def checkpoint(model: Any) -> tuple[dict[str, np.ndarray], str]:
    """Tensors and config.json of what `save_pretrained` writes."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        path = pathlib.Path(folder)
        return load_file(path / "model.safetensors"), (path / "config.json").read_text()


def described(model: Any, arrays: Arrays, loss: torch.Tensor | None = None) -> Arrays:
    """Adds config, weights and, if there is a loss, the gradients of all weights."""
    weights, config = checkpoint(model)
    arrays = {"config": np.array(config), **arrays}
    arrays |= {f"weights/{name}": tensor for name, tensor in weights.items()}
    if loss is not None:
        loss.backward()
        # In the parameters' place, so that they are renamed as those are.
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, f"no token reaches {name}; take another SEED"
            parameter.data = parameter.grad
        arrays["loss"] = loss
        arrays |= {f"gradients/{name}": tensor for name, tensor in checkpoint(model)[0].items()}
    return arrays


def decoder(kind: Any, config: Any, choices: int, gradients: bool = False) -> Arrays:
    """Tokens with some padding on the left, and logits."""
    generator = torch.Generator().manual_seed(SEED)
    model = kind(config).eval()
    randomize(model, generator)
    assert_clear(model, choices)
    tokens = torch.randint(0, V, (B, L), generator=generator)
    mask = torch.ones(B, L, dtype=torch.bool)
    mask[1, :3] = False
    logits = model(input_ids=tokens, attention_mask=mask.long()).logits
    arrays = {"tokens": tokens, "mask": mask, "logits": logits}
    if not gradients:
        return described(model, arrays)
    counted = mask[:, :-1] & mask[:, 1:]
    return described(model, arrays, cross_entropy(logits[:, :-1][counted], tokens[:, 1:][counted]))


def encoder_decoder(kind: Any, config: Any, choices: int, gradients: bool = False) -> Arrays:
    """Inputs with some padding on the right, targets, and logits."""
    generator = torch.Generator().manual_seed(SEED)
    model = kind(config).eval()
    randomize(model, generator)
    assert_clear(model, choices)
    inputs = torch.randint(1, V, (B, M), generator=generator)
    mask = torch.ones(B, M, dtype=torch.bool)
    mask[1, -2:] = False
    decoder_inputs = torch.randint(1, V, (B, L), generator=generator)
    decoder_inputs[:, 0] = 0
    targets = torch.randint(1, V, (B, L), generator=generator)
    logits = model(
        input_ids=inputs, attention_mask=mask.long(), decoder_input_ids=decoder_inputs
    ).logits
    arrays = {
        "inputs": inputs, "mask": mask, "decoder_inputs": decoder_inputs, "targets": targets,
        "logits": logits,
    }  # fmt: skip
    if not gradients:
        return described(model, arrays)
    return described(model, arrays, cross_entropy(logits.flatten(0, 1), targets.flatten()))


def switch() -> Arrays:
    """Top-1 of 4 experts in every second block, tied embeddings; with gradients."""
    config = transformers.SwitchTransformersConfig(
        vocab_size=V, d_model=D, d_kv=6, d_ff=12, num_layers=2, num_decoder_layers=2, num_heads=3,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_experts=4,
        expert_capacity=L, dropout_rate=0.0, router_jitter_noise=0.0, decoder_start_token_id=0,
        attn_implementation="eager",
    )  # fmt: skip
    kind = transformers.SwitchTransformersForConditionalGeneration
    return encoder_decoder(kind, config, 1, gradients=True)


def t5() -> Arrays:
    """T5 v1.1: gated GELU, an output layer of its own."""
    config = transformers.T5Config(
        vocab_size=V, d_model=D, d_kv=6, d_ff=24, num_layers=2, num_decoder_layers=3, num_heads=3,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, dropout_rate=0.0,
        decoder_start_token_id=0, attn_implementation="eager",
    )  # fmt: skip
    return encoder_decoder(untied_t5, config, 0)


def untied_t5(config: Any) -> Any:
    """As after loading a checkpoint that has an output layer: the constructor ties always."""
    model = transformers.T5ForConditionalGeneration(config)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.all_tied_weights_keys.pop("lm_head.weight")
    return model


def mixtral() -> Arrays:
    """Top-2 of 4 experts, 2 heads of keys and values; with gradients."""
    config = transformers.MixtralConfig(
        **DECODER, intermediate_size=24, num_key_value_heads=2, num_local_experts=4,
        num_experts_per_tok=2,
    )  # fmt: skip
    return decoder(transformers.MixtralForCausalLM, config, 2, gradients=True)


def olmoe() -> Arrays:
    """Top-3 of 8 small experts, norms over all heads' queries and keys."""
    config = transformers.OlmoeConfig(
        **DECODER, intermediate_size=12, num_key_value_heads=4, num_experts=8,
        num_experts_per_tok=3, norm_topk_prob=False, eos_token_id=2,
    )  # fmt: skip
    return decoder(transformers.OlmoeForCausalLM, config, 3)


def qwen2_moe() -> Arrays:
    """Biases of queries, keys and values; a shared expert of twice the width with a sigmoid gate."""
    config = transformers.Qwen2MoeConfig(
        **DECODER, intermediate_size=40, num_key_value_heads=2, num_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=12, shared_expert_intermediate_size=24,
        norm_topk_prob=False, decoder_sparse_step=1,
    )  # fmt: skip
    return decoder(transformers.Qwen2MoeForCausalLM, config, 2)


def qwen3_moe() -> Arrays:
    """Norms of each head's queries and keys, heads wider than d / heads; the first layer dense."""
    config = transformers.Qwen3MoeConfig(
        **DECODER, head_dim=6, intermediate_size=40, num_key_value_heads=2, num_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=12, norm_topk_prob=True, mlp_only_layers=[0],
    )  # fmt: skip
    return decoder(transformers.Qwen3MoeForCausalLM, config, 2)


LATENT = {
    "kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 8, "v_head_dim": 5,
    "num_key_value_heads": 4, "intermediate_size": 40, "moe_intermediate_size": 8,
    "first_k_dense_replace": 1, "n_routed_experts": 8, "num_experts_per_tok": 3,
}  # fmt: skip


def deepseek_v2() -> Arrays:
    """Like V2-Lite: queries are not compressed; greedy top-3, 2 shared experts, YaRN."""
    config = transformers.DeepseekV2Config(
        **DECODER, **LATENT, q_lora_rank=None, n_shared_experts=2, topk_method="greedy",
        n_group=1, topk_group=1, routed_scaling_factor=1.0, norm_topk_prob=False,
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 40.0, "beta_fast": 32,
            "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 64,
        },
    )  # fmt: skip
    return decoder(transformers.DeepseekV2ForCausalLM, config, 3)


def deepseek_v3() -> Arrays:
    """Compressed queries; sigmoid scores with a bias, 2 of 4 groups of experts, a shared expert."""
    config = transformers.DeepseekV3Config(
        **DECODER, **LATENT, q_lora_rank=10, n_shared_experts=1, n_group=4, topk_group=2,
        routed_scaling_factor=2.5, norm_topk_prob=True, num_nextn_predict_layers=0,
    )  # fmt: skip
    return decoder(transformers.DeepseekV3ForCausalLM, config, 3)


def vit() -> Arrays:
    """Four patches of a small image and a class token."""
    generator = torch.Generator().manual_seed(SEED)
    config = transformers.ViTConfig(
        hidden_size=D, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
        image_size=8, patch_size=4, num_labels=5, attn_implementation="eager",
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config).eval()
    randomize(model, generator)
    images = (torch.randn(B, 3, 8, 8, generator=generator) * 64).round() / 64
    return described(model, {"images": images, "logits": model(pixel_values=images).logits})


MODELS: dict[str, Callable[[], Arrays]] = {
    function.__name__: function
    for function in (
        switch, t5, mixtral, olmoe, qwen2_moe, qwen3_moe, deepseek_v2, deepseek_v3, vit,
    )
}  # fmt: skip


def metadata() -> str:
    """The versions that the files were made with, and the seed."""
    versions = {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return json.dumps({"seed": SEED} | versions)


def write(folder: pathlib.Path) -> None:
    """One .npz per model."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, model in MODELS.items():
        arrays = {
            key: a if isinstance(a, np.ndarray) else a.detach().numpy()
            for key, a in model().items()
        }
        np.savez_compressed(folder / f"{name}.npz", metadata=np.array(metadata()), **arrays)


def differences(one: pathlib.Path, other: pathlib.Path) -> list[str]:
    """What is not the same in two folders' files, but for the metadata."""
    found = []
    for name in MODELS:
        if not (one / f"{name}.npz").exists():
            found.append(f"{name}.npz is missing")
            continue
        a, b = np.load(one / f"{name}.npz"), np.load(other / f"{name}.npz")
        for key in sorted({*a.files, *b.files} - {"metadata"}):
            if key not in a.files or key not in b.files:
                found.append(f"{name}.npz: {key} is in one of the two only")
            elif not _same(a[key], b[key]):
                found.append(f"{name}.npz: {key} differs")
    return found


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    if a.shape != b.shape or a.dtype.kind != b.dtype.kind:
        return False
    if a.dtype.kind != "f":
        return bool((a == b).all())
    # Sums may be added up in another order on another processor, and their rounding goes with their
    # terms, not with a result near 0: T5's logits, up to 4.2, differ by 3.4e-6 between an Intel
    # Xeon and an AMD EPYC.
    return bool(np.abs(a - b).max() <= 1e-5 * np.abs(b).max())


def main() -> int:
    """Writes the files, or compares them; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=pathlib.Path, default=HERE, help="folder of the files")
    parser.add_argument(
        "--check", action="store_true", help="compare with the files, write nothing"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    if not arguments.check:
        write(arguments.output)
        return 0
    with tempfile.TemporaryDirectory() as fresh:
        write(pathlib.Path(fresh))
        found = differences(arguments.output, pathlib.Path(fresh))
    print(*found or ["the files are as these versions make them:"], sep="\n")
    print(metadata())
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
