"""Writes what the routers of Hugging Face `transformers` answer, for test_routers.py to compare with.

    python tests/parity/generate.py                  write the .npz files beside this script
    python tests/parity/generate.py --output=DIR     write them elsewhere
    python tests/parity/generate.py --check          write nothing; fail if the files are outdated

Needs torch and transformers (the extra `parity`); the test needs only the files.

Axis letters: B rows, L tokens per row, T = B * L tokens, N layers, K choices, E experts, d width,
f expert width. Every file holds, in float32 unless said otherwise:

  metadata            json: seed and the versions of python, numpy, torch and transformers
  x                   [B, L, d] what the router is given
  weights             [N, E, d] router weights; all layers see the same x
  cotangent           what the gates are multiplied with before `gates_gradient` is taken
  gates, experts      [N, T, K] and int64; Switch: [N, B, L]; DeepSeek-V3: in no particular order
  gates_gradient      [N, E, d] gradient of sum(gates * cotangent) with respect to the weights

and what the functions below add.
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
from transformers.models.deepseek_v3 import modeling_deepseek_v3
from transformers.models.mixtral import modeling_mixtral
from transformers.models.olmoe import modeling_olmoe
from transformers.models.qwen2_moe import modeling_qwen2_moe
from transformers.models.qwen3_moe import modeling_qwen3_moe
from transformers.models.switch_transformers import modeling_switch_transformers

SEED = 1
B, L, D, F, E, N = 2, 12, 8, 16, 8, 2
HERE = pathlib.Path(__file__).parent
Arrays = dict[str, Any]
Draw = Callable[..., torch.Tensor]


def draws(name: str) -> Draw:
    """Normal draws that depend on the seed and on which router they are for."""
    generator = torch.Generator().manual_seed(SEED + list(ROUTERS).index(name))
    return lambda *shape, scale=1.0: scale * torch.randn(*shape, generator=generator)


def assert_clear(scores: torch.Tensor, count: int) -> None:
    """No order among the `count` + 1 largest of the last axis may hang on a rounding."""
    largest = scores.sort(dim=-1, descending=True).values[..., : count + 1]
    gap = -largest.diff(dim=-1).max().item()
    assert gap > 1e-4, f"two scores differ by {gap} only; take another SEED"


def gradient(value: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """[E, d] of one number, without using up the graph."""
    return torch.autograd.grad(value, weights, retain_graph=True)[0]


def switch(draw: Draw) -> Arrays:
    """Adds capacity, dispatch, losses and the output of the whole sparse layer.

    capacity: [] slots per expert and row. dispatch: [N, B, L, E] int64 one-hot, 0 where the token
    was dropped. load_balancing, router_z: [N], of each layer; load_balancing_gradient: [N, E, d].
    load_balancing_of_layers, router_z_of_layers: [] of all layers, joined as the model joins them.
    w_in: [E, f, d], w_out: [E, d, f], output: [B, L, d] of the first layer.
    """
    capacity = 2
    config = transformers.SwitchTransformersConfig(
        d_model=D, d_ff=F, num_experts=E, expert_capacity=capacity, dense_act_fn="relu",
        dropout_rate=0.0,
    )  # fmt: skip
    model = modeling_switch_transformers
    x, cotangent = draw(B, L, D), draw(N, B, L)
    layers, all_logits = [], []
    for layer in range(N):
        block = model.SwitchTransformersSparseMLP(config).eval()
        weights = block.router.classifier.weight
        weights.data = draw(E, D, scale=0.5)
        for expert in block.experts.values():
            expert.wi.weight.data, expert.wo.weight.data = draw(F, D), draw(D, F)
        dispatch, gates, logits = block.router(x)
        probabilities, experts = logits.softmax(dim=-1), logits.argmax(dim=-1)
        assert_clear(probabilities, 1)
        balance = model.load_balancing_loss_func(probabilities, experts)
        layers.append(
            {
                "weights": weights,
                "gates": gates[..., 0],
                "experts": experts,
                "gates_gradient": gradient((gates[..., 0] * cotangent[layer]).sum(), weights),
                "dispatch": dispatch,
                "load_balancing": balance,
                "load_balancing_gradient": gradient(balance, weights),
                "router_z": model.router_z_loss_func(logits),
                "w_in": torch.stack([expert.wi.weight for expert in block.experts.values()]),
                "w_out": torch.stack([expert.wo.weight for expert in block.experts.values()]),
                "output": block(x),
            }
        )
        all_logits.append(logits)
    # What SwitchTransformersForConditionalGeneration does with the layers of a stack.
    logits, experts = model.SwitchTransformersForConditionalGeneration._unpack_router_logits(
        None, all_logits
    )
    joined = {
        "load_balancing_of_layers": model.load_balancing_loss_func(logits.softmax(-1), experts),
        "router_z_of_layers": model.router_z_loss_func(logits),
    }
    first = {name: layers[0].pop(name) for name in ("w_in", "w_out", "output")}
    return {"x": x, "cotangent": cotangent, "capacity": capacity} | stacked(layers) | first | joined


def stacked(layers: list[Arrays]) -> Arrays:
    """The arrays that the first layer names, with a leading axis N."""
    return {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]}


def softmax_router(draw: Draw, router_type: Any, config: Any, loss: Any) -> Arrays:
    """Mixtral and those made like it; adds the mask and the loss.

    mask: [B, L] bool, False for padding. load_balancing, load_balancing_masked: [N] of each layer,
    without and with the mask; load_balancing_gradient: [N, E, d] of the second of them.
    load_balancing_of_layers, load_balancing_of_layers_masked: [] as the model calls the function,
    with the logits of all layers.
    """
    choices = config.num_experts_per_tok
    mask = torch.ones(B, L, dtype=torch.int64)
    mask[0, :3] = 0  # Left, as for generation,
    mask[1, -2:] = 0  # and right, as for training.
    x, cotangent = draw(B, L, D), draw(N, B * L, choices)
    layers, all_logits = [], []
    for layer in range(N):
        router = router_type(config)
        router.weight.data = draw(E, D, scale=0.5)
        logits, gates, experts = router(x)
        assert_clear(logits.softmax(dim=-1), choices)
        balance = loss((logits,), E, choices)
        masked = loss((logits,), E, choices, mask)
        layers.append(
            {
                "weights": router.weight,
                "gates": gates,
                "experts": experts,
                "gates_gradient": gradient((gates * cotangent[layer]).sum(), router.weight),
                "load_balancing": balance,
                "load_balancing_masked": masked,
                "load_balancing_gradient": gradient(masked, router.weight),
            }
        )
        all_logits.append(logits)
    joined = {
        "load_balancing_of_layers": loss(tuple(all_logits), E, choices),
        "load_balancing_of_layers_masked": loss(tuple(all_logits), E, choices, mask),
    }
    return {"x": x, "cotangent": cotangent, "mask": mask.bool()} | stacked(layers) | joined


def mixtral(draw: Draw) -> Arrays:
    """K = 2, gates over their sum."""
    config = transformers.MixtralConfig(
        hidden_size=D, intermediate_size=F, num_local_experts=E, num_experts_per_tok=2
    )
    model = modeling_mixtral
    return softmax_router(draw, model.MixtralTopKRouter, config, model.load_balancing_loss_func)


def olmoe(draw: Draw) -> Arrays:
    """K = 3, gates as they are."""
    config = transformers.OlmoeConfig(
        hidden_size=D, intermediate_size=F, num_experts=E, num_experts_per_tok=3,
        norm_topk_prob=False,
    )  # fmt: skip
    model = modeling_olmoe
    return softmax_router(draw, model.OlmoeTopKRouter, config, model.load_balancing_loss_func)


def qwen2_moe(draw: Draw) -> Arrays:
    """K = 4, gates over their sum."""
    config = transformers.Qwen2MoeConfig(
        hidden_size=D, moe_intermediate_size=F, num_experts=E, num_experts_per_tok=4,
        norm_topk_prob=True,
    )  # fmt: skip
    model = modeling_qwen2_moe
    return softmax_router(draw, model.Qwen2MoeTopKRouter, config, model.load_balancing_loss_func)


def qwen3_moe(draw: Draw) -> Arrays:
    """K = 3, gates over their sum."""
    config = transformers.Qwen3MoeConfig(
        hidden_size=D, moe_intermediate_size=F, num_experts=E, num_experts_per_tok=3,
        norm_topk_prob=True,
    )  # fmt: skip
    model = modeling_qwen3_moe
    return softmax_router(draw, model.Qwen3MoeTopKRouter, config, model.load_balancing_loss_func)


def deepseek_v3(draw: Draw) -> Arrays:
    """Adds the bias and the routing settings; K = 3, gates over their sum times 2.5.

    bias: [N, E] added to the scores that experts are chosen by. groups, groups_per_token: [N]
    int64; the second layer does not limit the groups. gate_scale: [].
    """
    choices, gate_scale = 3, 2.5
    limits = torch.tensor([[4, 2], [1, 1]])
    x, cotangent = draw(B, L, D), draw(N, B * L, choices)
    layers = []
    for layer, (groups, groups_per_token) in enumerate(limits.tolist()):
        config = transformers.DeepseekV3Config(
            hidden_size=D, moe_intermediate_size=F, n_routed_experts=E, num_experts_per_tok=choices,
            n_group=groups, topk_group=groups_per_token, norm_topk_prob=True,
            routed_scaling_factor=gate_scale,
        )  # fmt: skip
        router = modeling_deepseek_v3.DeepseekV3TopkRouter(config)
        router.weight.data = draw(E, D, scale=0.5)
        # So large that it decides much, and so low that some chosen scores are below 0: an expert
        # outside of the groups must not be taken for one of score 0.
        router.e_score_correction_bias.data = draw(E, scale=0.5) - 1.0
        logits, gates, experts = router(x)
        biased = logits.sigmoid() + router.e_score_correction_bias
        assert (biased.gather(1, experts) < 0).any()
        assert_clear(biased, E - 1)
        if groups > 1:
            assert_clear(biased.view(B * L, groups, -1).topk(2)[0].sum(-1), groups_per_token)
        # Row by row, so that a repeated expert would show.
        assert all(len(set(row)) == choices for row in experts.tolist())
        layers.append(
            {
                "weights": router.weight,
                "bias": router.e_score_correction_bias,
                "gates": gates,
                "experts": experts,
                "gates_gradient": gradient((gates * cotangent[layer]).sum(), router.weight),
            }
        )
    settings = {
        "groups": limits[:, 0],
        "groups_per_token": limits[:, 1],
        "gate_scale": torch.tensor(gate_scale),
    }
    return {"x": x, "cotangent": cotangent} | stacked(layers) | settings


ROUTERS: dict[str, Callable[[Draw], Arrays]] = {
    "switch": switch,
    "mixtral": mixtral,
    "olmoe": olmoe,
    "qwen2_moe": qwen2_moe,
    "qwen3_moe": qwen3_moe,
    "deepseek_v3": deepseek_v3,
}


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
    """One .npz per router."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, router in ROUTERS.items():
        arrays = {
            key: torch.as_tensor(a).detach().numpy() for key, a in router(draws(name)).items()
        }
        np.savez_compressed(folder / f"{name}.npz", metadata=np.array(metadata()), **arrays)


def differences(one: pathlib.Path, other: pathlib.Path) -> list[str]:
    """What is not the same in two folders' files, but for the metadata."""
    found = []
    for name in ROUTERS:
        if not (one / f"{name}.npz").exists():
            found.append(f"{name}.npz is missing")
            continue
        a, b = np.load(one / f"{name}.npz"), np.load(other / f"{name}.npz")
        for key in sorted({*a.files, *b.files} - {"metadata"}):
            if key not in a.files or key not in b.files:
                found.append(f"{name}.npz: {key} is in one of the two only")
            elif a[key].shape != b[key].shape or not np.allclose(a[key], b[key], 1e-6, 1e-6):
                found.append(f"{name}.npz: {key} differs")
    return found


def main() -> int:
    """Writes the files, or compares them; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=pathlib.Path, default=HERE, help="folder of the files")
    parser.add_argument(
        "--check", action="store_true", help="compare with the files, write nothing"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
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
