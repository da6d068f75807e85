"""Qwen 1.5 and 2 with experts (Yang et al. 2024): `Qwen2MoeForCausalLM`."""

from typing import Any

from moe_jax.errors import UserError
from moe_jax.interop.huggingface import llama_like, ties
from moe_jax.interop.huggingface.family import (
    Family,
    component,
    dense_blocks,
    dropless_moe,
    moe_blocks,
)
from moe_jax.interop.huggingface.fields import MOST_EXPERTS, Fields, whole_numbers
from moe_jax.interop.huggingface.rotary import rotary_fields
from moe_jax.interop.huggingface.table import Tensor, TensorRow
from moe_jax.layers.attention import MultiHead
from moe_jax.layers.shared_experts import BranchMix
from moe_jax.models.decoder_lm import DecoderLMConfig
from moe_jax.routing.token_choice import TopK

_SPARSE = (
    *llama_like.SPARSE,
    TensorRow("mlp/shared/mix", "mlp.shared_expert_gate.weight", "g d -> d g"),
    TensorRow("mlp/shared/dense/w_gate", "mlp.shared_expert.gate_proj.weight", "f d -> d f"),
    TensorRow("mlp/shared/dense/w_in", "mlp.shared_expert.up_proj.weight", "f d -> d f"),
    TensorRow("mlp/shared/dense/w_out", "mlp.shared_expert.down_proj.weight", "d f -> f d"),
)


# Which layers have windows, where there are any.
IRRELEVANT = llama_like.IRRELEVANT | {"max_window_layers"}


def read(fields: Fields) -> DecoderLMConfig:
    """See `Family`.

    Raises:
      UserError: the shared expert is not as wide as a whole number of experts, or config.json asks
        for what is not supported.
    """
    llama_like.check_no_window(fields, used=fields.flag("use_sliding_window", False))
    experts, blocks = sparse_blocks(fields, 60)
    width = fields.integer("moe_intermediate_size", 1408)
    shared, rest = divmod(
        fields.integer("shared_expert_intermediate_size", 5632, at_least=0), width
    )
    if rest and blocks:
        raise UserError(
            f"config.json has shared_expert_intermediate_size="
            f"{fields['shared_expert_intermediate_size']}, which must be a multiple of "
            f"moe_intermediate_size={width} to be supported."
        )
    k = llama_like.experts_per_token(fields, 4, experts) if blocks else 1
    return DecoderLMConfig(
        **llama_like.model_fields(fields),
        **moe_blocks(blocks, llama_like.num_layers(fields)),
        head_width=llama_like.head_width(fields),
        mlp_width=fields.integer("intermediate_size"),
        expert_width=width,
        attention=MultiHead(**llama_like.heads(fields, 16), qkv_bias=fields.flag("qkv_bias", True)),
        num_experts=experts,
        moe=dropless_moe(
            llama_like.top_k(k, fields), llama_like.feed_forward(fields), shared, BranchMix.SIGMOID
        ),
    )


def sparse_blocks(fields: Fields, default_experts: int) -> tuple[int, list[int]]:
    """The number of experts, and the indices of the blocks that have them.

    A model without any has one expert in no block.
    """
    name = "num_experts"
    experts = fields.integer(name, default_experts, at_least=0, at_most=MOST_EXPERTS)
    step = fields.integer("decoder_sparse_step", 1)
    dense = set(whole_numbers(fields, "mlp_only_layers"))
    fields.raw("num_experts_per_tok")  # Where there are no blocks with experts nothing needs it.
    if not experts:
        return 1, []
    layers = range(llama_like.num_layers(fields))
    return experts, [i for i in layers if i not in dense and (i + 1) % step == 0]


def config_to_hf(config: DecoderLMConfig) -> dict[str, Any]:
    """See `Family`."""
    attention = component(config.attention, MultiHead, "model.attention", "qwen2_moe")
    router = component(config.moe.router, TopK, "model.moe.router", "qwen2_moe")
    expert_width = config.expert_width or config.mlp_width
    return {
        **llama_like.hf_fields(config, "qwen2_moe", "Qwen2MoeForCausalLM"),
        **rotary_fields(attention.rotary_base, attention.rotary_scaling, False),
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


FAMILY = Family(
    "qwen2_moe",
    read,
    config_to_hf,
    tensors,
    irrelevant=IRRELEVANT,
    tables=ties.of_decoder,
    experts=llama_like.EXPERTS,
    unread=llama_like.unread,
)
