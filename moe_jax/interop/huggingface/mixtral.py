"""Mixtral (Jiang et al. 2024): `MixtralForCausalLM`."""

from typing import Any

from moe_jax.interop.huggingface import llama_like, ties
from moe_jax.interop.huggingface.family import Family, component, dropless_moe
from moe_jax.interop.huggingface.fields import MOST_EXPERTS, Fields
from moe_jax.interop.huggingface.rotary import rotary_fields
from moe_jax.interop.huggingface.table import Tensor, TensorRow
from moe_jax.layers.attention import MultiHead
from moe_jax.models.decoder_lm import DecoderLMConfig
from moe_jax.routing.token_choice import TopK

_EXPERTS = ("w1.weight", "w3.weight", "w2.weight")
_SPARSE = (
    TensorRow("mlp/router/weights", "block_sparse_moe.gate.weight", "E d -> d E"),
    TensorRow("mlp/w_gate[{expert}]", "block_sparse_moe.experts.{expert}.w1.weight", "f d -> d f"),
    TensorRow("mlp/w_in[{expert}]", "block_sparse_moe.experts.{expert}.w3.weight", "f d -> d f"),
    TensorRow("mlp/w_out[{expert}]", "block_sparse_moe.experts.{expert}.w2.weight", "d f -> f d"),
)

_DEFAULT_BASE = 1e6


def read(fields: Fields) -> DecoderLMConfig:
    """See `Family`."""
    llama_like.check_no_window(fields)
    # Of the inputs of a MoE, experts included, in training.
    fields.only("router_jitter_noise", 0.0, None)
    experts = fields.integer("num_local_experts", 8, at_most=MOST_EXPERTS)
    k = llama_like.experts_per_token(fields, 2, experts)
    return DecoderLMConfig(
        **llama_like.model_fields(fields, norm_epsilon=1e-5),
        head_width=llama_like.head_width(fields),
        mlp_width=fields.integer("intermediate_size"),
        attention=MultiHead(**llama_like.heads(fields, 8, _DEFAULT_BASE)),
        num_experts=experts,
        moe_every=1,
        moe=dropless_moe(
            llama_like.top_k(k, fields, renormalize=True), llama_like.feed_forward(fields)
        ),
    )


def config_to_hf(config: DecoderLMConfig) -> dict[str, Any]:
    """See `Family`."""
    attention = component(config.attention, MultiHead, "model.attention", "mixtral")
    router = component(config.moe.router, TopK, "model.moe.router", "mixtral")
    return {
        **llama_like.hf_fields(config, "mixtral", "MixtralForCausalLM"),
        **rotary_fields(attention.rotary_base, attention.rotary_scaling, False),
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


FAMILY = Family(
    "mixtral",
    read,
    config_to_hf,
    tensors,
    aliases={"num_experts": "num_local_experts"},
    irrelevant=llama_like.IRRELEVANT,
    tables=ties.of_decoder,
    renamed=((r"^(model\.layers\.\d+)\.mlp\.", r"\1.block_sparse_moe."),),
    experts=_EXPERTS,
    unread=llama_like.unread,
)
