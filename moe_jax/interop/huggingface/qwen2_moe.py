"""Qwen 1.5 and 2 with experts (Yang et al. 2024): `Qwen2MoeForCausalLM`."""

from typing import Any

from moe_jax.errors import UserError
from moe_jax.interop.huggingface import llama_like
from moe_jax.interop.huggingface.family import (
    Family,
    Fields,
    component,
    dense_blocks,
    dropless_moe,
    moe_blocks,
    refuse_other,
    required,
)
from moe_jax.interop.huggingface.table import Tensor, TensorRow
from moe_jax.layers.attention import MultiHead
from moe_jax.layers.shared_experts import BranchMix
from moe_jax.models.decoder_lm import DecoderLMConfig
from moe_jax.routing.losses import Losses
from moe_jax.routing.token_choice import TopK

_SPARSE = (
    *llama_like.SPARSE,
    TensorRow("mlp/shared/mix", "mlp.shared_expert_gate.weight", "g d -> d g"),
    TensorRow("mlp/shared/dense/w_gate", "mlp.shared_expert.gate_proj.weight", "f d -> d f"),
    TensorRow("mlp/shared/dense/w_in", "mlp.shared_expert.up_proj.weight", "f d -> d f"),
    TensorRow("mlp/shared/dense/w_out", "mlp.shared_expert.down_proj.weight", "d f -> f d"),
)


def config_from_hf(hf: Fields) -> DecoderLMConfig:
    """See `Family`.

    Raises:
      UserError: the shared expert is not as wide as a whole number of experts, or config.json asks
        for what is not supported.
    """
    refuse_other(hf, use_sliding_window=False)
    router = TopK(
        k=required(hf, "num_experts_per_tok"),
        renormalize=hf.get("norm_topk_prob", False),
        losses=Losses(),
    )
    width = required(hf, "moe_intermediate_size")
    shared, rest = divmod(required(hf, "shared_expert_intermediate_size"), width)
    if rest:
        raise UserError(
            f"config.json has shared_expert_intermediate_size="
            f"{hf['shared_expert_intermediate_size']}, which must be a multiple of "
            f"moe_intermediate_size={width} to be supported."
        )
    form = llama_like.feed_forward(hf)
    return DecoderLMConfig(
        **llama_like.model_fields(hf),
        **moe_blocks(sparse_blocks(hf), hf["num_hidden_layers"]),
        head_width=llama_like.head_width(hf),
        mlp_width=required(hf, "intermediate_size"),
        expert_width=width,
        attention=MultiHead(
            kv_heads=required(hf, "num_key_value_heads"),
            rotary_base=llama_like.rotary_base(hf),
            qkv_bias=hf.get("qkv_bias", True),
        ),
        num_experts=required(hf, "num_experts"),
        moe=dropless_moe(router, form, shared, BranchMix.SIGMOID),
    )


def sparse_blocks(hf: Fields) -> list[int]:
    """Indices of the blocks with a MoE."""
    step = hf.get("decoder_sparse_step", 1)
    dense = hf.get("mlp_only_layers") or []
    return [
        layer
        for layer in range(hf["num_hidden_layers"])
        if layer not in dense and (layer + 1) % step == 0
    ]


def config_to_hf(config: DecoderLMConfig) -> dict[str, Any]:
    """See `Family`."""
    attention = component(config.attention, MultiHead, "model.attention", "qwen2_moe")
    router = component(config.moe.router, TopK, "model.moe.router", "qwen2_moe")
    expert_width = config.expert_width or config.mlp_width
    return {
        **llama_like.hf_fields(config, "qwen2_moe", "Qwen2MoeForCausalLM"),
        **llama_like.plain_rotary(attention.rotary_base),
        "qkv_bias": attention.qkv_bias,
        "intermediate_size": config.mlp_width,
        "moe_intermediate_size": expert_width,
        "shared_expert_intermediate_size": config.moe.shared_experts * expert_width,
        "num_key_value_heads": attention.kv_heads or config.num_heads,
        "num_experts": config.num_experts,
        "num_experts_per_tok": router.k,
        "norm_topk_prob": router.renormalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense_blocks(config),
        "use_sliding_window": False,
    }


def tensors(config: DecoderLMConfig) -> list[Tensor]:
    """See `Family`."""
    return llama_like.tensors(config, sparse=_SPARSE)


FAMILY = Family("qwen2_moe", config_from_hf, config_to_hf, tensors, llama_like.IGNORED)
