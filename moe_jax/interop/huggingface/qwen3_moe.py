"""Qwen 3 with experts (Yang et al. 2025): `Qwen3MoeForCausalLM`."""

from typing import Any

from moe_jax.interop.huggingface import llama_like, ties
from moe_jax.interop.huggingface.family import (
    Family,
    component,
    dense_blocks,
    dropless_moe,
    moe_blocks,
)
from moe_jax.interop.huggingface.fields import Fields
from moe_jax.interop.huggingface.qwen2_moe import IRRELEVANT, sparse_blocks
from moe_jax.interop.huggingface.rotary import rotary_fields
from moe_jax.layers.attention import MultiHead, QKNorm
from moe_jax.models.decoder_lm import DecoderLMConfig
from moe_jax.routing.token_choice import TopK


def read(fields: Fields) -> DecoderLMConfig:
    """See `Family`."""
    llama_like.check_no_window(fields, used=fields.flag("use_sliding_window", False))
    model = llama_like.model_fields(fields)
    experts, blocks = sparse_blocks(fields, 128)
    k = llama_like.experts_per_token(fields, 8, experts) if blocks else 1
    bias = fields.flag("attention_bias", False)
    return DecoderLMConfig(
        **model,
        **moe_blocks(blocks, model["num_layers"]),
        head_width=llama_like.head_width(fields),
        mlp_width=fields.integer("intermediate_size"),
        expert_width=fields.integer("moe_intermediate_size", 768),
        attention=MultiHead(
            **llama_like.heads(fields, 4),
            qk_norm=QKNorm.HEAD,
            norm_epsilon=model["norm_epsilon"],
            qkv_bias=bias,
            out_bias=bias,
        ),
        num_experts=experts,
        moe=dropless_moe(llama_like.top_k(k, fields), llama_like.feed_forward(fields)),
    )


def config_to_hf(config: DecoderLMConfig) -> dict[str, Any]:
    """See `Family`."""
    attention = component(config.attention, MultiHead, "model.attention", "qwen3_moe")
    router = component(config.moe.router, TopK, "model.moe.router", "qwen3_moe")
    return {
        **llama_like.hf_fields(config, "qwen3_moe", "Qwen3MoeForCausalLM"),
        **rotary_fields(attention.rotary_base, attention.rotary_scaling, False),
        "attention_bias": attention.qkv_bias,
        "head_dim": config.head_width,
        "intermediate_size": config.mlp_width,
        "moe_intermediate_size": config.expert_width or config.mlp_width,
        "num_key_value_heads": attention.kv_heads or config.num_heads,
        "num_experts": config.num_experts,
        "num_experts_per_tok": router.k,
        "norm_topk_prob": router.renormalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense_blocks(config),
        "use_sliding_window": False,
    }


FAMILY = Family(
    "qwen3_moe",
    read,
    config_to_hf,
    llama_like.tensors,
    # Released models say num_experts; transformers 5 writes num_local_experts.
    aliases={"num_local_experts": "num_experts"},
    irrelevant=IRRELEVANT,
    tables=ties.of_decoder,
    experts=llama_like.EXPERTS,
    unread=llama_like.unread,
)
