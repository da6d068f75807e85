"""OLMoE (Muennighoff et al. 2024): `OlmoeForCausalLM`."""

from typing import Any

from moe_jax.interop.huggingface import llama_like, ties
from moe_jax.interop.huggingface.family import Family, component, dropless_moe
from moe_jax.interop.huggingface.fields import MOST_EXPERTS, Fields
from moe_jax.interop.huggingface.rotary import rotary_fields
from moe_jax.layers.attention import MultiHead, QKNorm
from moe_jax.models.decoder_lm import DecoderLMConfig
from moe_jax.routing.token_choice import TopK


def read(fields: Fields) -> DecoderLMConfig:
    """See `Family`."""
    fields.only("clip_qkv", None)
    # Some attention programs of transformers use a window that the family does not have.
    llama_like.check_no_window(fields)
    model = llama_like.model_fields(fields, norm_epsilon=1e-5)
    # The norms of queries and keys are as wide as that.
    share = model["width"] // model["num_heads"]
    fields.only("head_dim", share, None)
    bias = fields.flag("attention_bias", False)
    experts = fields.integer("num_experts", 64, at_most=MOST_EXPERTS)
    k = llama_like.experts_per_token(fields, 8, experts)
    return DecoderLMConfig(
        **model,
        head_width=share,
        mlp_width=fields.integer("intermediate_size"),
        attention=MultiHead(
            **llama_like.heads(fields, None),
            qk_norm=QKNorm.FULL,
            norm_epsilon=model["norm_epsilon"],
            qkv_bias=bias,
            out_bias=bias,
        ),
        num_experts=experts,
        moe_every=1,
        moe=dropless_moe(llama_like.top_k(k, fields), llama_like.feed_forward(fields)),
    )


def config_to_hf(config: DecoderLMConfig) -> dict[str, Any]:
    """See `Family`."""
    attention = component(config.attention, MultiHead, "model.attention", "olmoe")
    router = component(config.moe.router, TopK, "model.moe.router", "olmoe")
    return {
        **llama_like.hf_fields(config, "olmoe", "OlmoeForCausalLM"),
        **rotary_fields(attention.rotary_base, attention.rotary_scaling, False),
        "attention_bias": attention.qkv_bias,
        "clip_qkv": None,
        "intermediate_size": config.expert_width or config.mlp_width,
        "num_key_value_heads": attention.kv_heads or config.num_heads,
        "num_experts": config.num_experts,
        "num_experts_per_tok": router.k,
        "norm_topk_prob": router.renormalize,
    }


FAMILY = Family(
    "olmoe",
    read,
    config_to_hf,
    llama_like.tensors,
    aliases={"num_local_experts": "num_experts"},
    irrelevant=llama_like.IRRELEVANT,
    tables=ties.of_decoder,
    experts=llama_like.EXPERTS,
    unread=llama_like.unread,
)
