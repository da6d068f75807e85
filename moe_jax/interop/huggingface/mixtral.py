"""Mixtral (Jiang et al. 2024): `MixtralForCausalLM`."""

from typing import Any

from moe_jax.interop.huggingface import llama_like
from moe_jax.interop.huggingface.family import (
    Family,
    Fields,
    component,
    dropless_moe,
    refuse_other,
    required,
)
from moe_jax.interop.huggingface.table import Tensor, TensorRow
from moe_jax.layers.attention import MultiHead
from moe_jax.models.decoder_lm import DecoderLMConfig
from moe_jax.routing.losses import Losses
from moe_jax.routing.token_choice import TopK

_SPARSE = (
    TensorRow("mlp/router/weights", "block_sparse_moe.gate.weight", "E d -> d E"),
    TensorRow("mlp/w_gate[{expert}]", "block_sparse_moe.experts.{expert}.w1.weight", "f d -> d f"),
    TensorRow("mlp/w_in[{expert}]", "block_sparse_moe.experts.{expert}.w3.weight", "f d -> d f"),
    TensorRow("mlp/w_out[{expert}]", "block_sparse_moe.experts.{expert}.w2.weight", "d f -> f d"),
)

_DEFAULT_BASE = 1e6


def config_from_hf(hf: Fields) -> DecoderLMConfig:
    """See `Family`."""
    refuse_other(hf, sliding_window=None)
    router = TopK(k=required(hf, "num_experts_per_tok"), renormalize=True, losses=Losses())
    with_base = hf if "rope_parameters" in hf else {"rope_theta": _DEFAULT_BASE, **hf}
    return DecoderLMConfig(
        **llama_like.model_fields(hf),
        head_width=llama_like.head_width(hf),
        mlp_width=required(hf, "intermediate_size"),
        attention=MultiHead(
            kv_heads=required(hf, "num_key_value_heads"),
            rotary_base=llama_like.rotary_base(with_base),
        ),
        num_experts=required(hf, "num_local_experts"),
        moe_every=1,
        moe=dropless_moe(router, llama_like.feed_forward(hf)),
    )


def config_to_hf(config: DecoderLMConfig) -> dict[str, Any]:
    """See `Family`."""
    attention = component(config.attention, MultiHead, "model.attention", "mixtral")
    router = component(config.moe.router, TopK, "model.moe.router", "mixtral")
    return {
        **llama_like.hf_fields(config, "mixtral", "MixtralForCausalLM"),
        **llama_like.plain_rotary(attention.rotary_base),
        "head_dim": config.head_width,
        "intermediate_size": config.expert_width or config.mlp_width,
        "num_key_value_heads": attention.kv_heads or config.num_heads,
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": router.k,
        "sliding_window": None,
    }


def tensors(config: DecoderLMConfig) -> list[Tensor]:
    """See `Family`."""
    return llama_like.tensors(config, sparse=_SPARSE)


FAMILY = Family("mixtral", config_from_hf, config_to_hf, tensors, llama_like.IGNORED)
