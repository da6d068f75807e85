"""DeepSeek-V2 and V2-Lite (2024): `DeepseekV2ForCausalLM`."""

from collections.abc import Mapping
from typing import Any

from moe_jax.errors import UserError
from moe_jax.interop.huggingface import llama_like
from moe_jax.interop.huggingface.family import (
    Family,
    Fields,
    component,
    dropless_moe,
    moe_blocks,
    refuse_other,
    required,
)
from moe_jax.interop.huggingface.table import Tensor, TensorRow
from moe_jax.layers.latent_attention import MultiHeadLatent
from moe_jax.layers.positions import RotaryScaling
from moe_jax.models.decoder_lm import DecoderLMConfig
from moe_jax.routing.deepseek import DeepSeekV2
from moe_jax.routing.losses import Losses
from moe_jax.routing.token_choice import TokenChoice, TopK

SPARSE = (
    *llama_like.SPARSE,
    TensorRow("mlp/shared/dense/w_gate", "mlp.shared_experts.gate_proj.weight", "f d -> d f"),
    TensorRow("mlp/shared/dense/w_in", "mlp.shared_experts.up_proj.weight", "f d -> d f"),
    TensorRow("mlp/shared/dense/w_out", "mlp.shared_experts.down_proj.weight", "d f -> f d"),
)

# Their name of each field of `MultiHeadLatent`.
_WIDTHS = {
    "kv_rank": "kv_lora_rank",
    "nope_width": "qk_nope_head_dim",
    "rotary_width": "qk_rope_head_dim",
    "value_width": "v_head_dim",
}

# Their name of each field of `RotaryScaling`, and what they take where it is missing.
_SCALING: Mapping[str, tuple[str, float | int]] = {
    "factor": ("factor", 1.0),
    "original_length": ("original_max_position_embeddings", 4096),
    "beta_fast": ("beta_fast", 32.0),
    "beta_slow": ("beta_slow", 1.0),
    "mscale": ("mscale", 1.0),
    "mscale_all_dim": ("mscale_all_dim", 0.0),
}

# The norms of the compressed vectors have transformers' default, whatever rms_norm_eps is.
_LATENT_EPSILON = 1e-6

_GREEDY, _LIMITED = "greedy", "group_limited_greedy"


def attention_rows(attention: MultiHeadLatent) -> tuple[TensorRow, ...]:
    """Rotated pairs of queries and keys are neighbours there."""
    pairs = attention.rotary_width
    queries: tuple[TensorRow, ...] = (
        TensorRow("attention/query_down", "self_attn.q_a_proj.weight", "q d -> d q"),
        TensorRow("attention/query_norm/scale", "self_attn.q_a_layernorm.weight", "q -> q"),
        TensorRow("attention/query", "self_attn.q_b_proj.weight", "(H n) q -> q H n", pairs),
    )
    if not attention.query_rank:
        queries = (
            TensorRow("attention/query", "self_attn.q_proj.weight", "(H n) d -> d H n", pairs),
        )
    return (
        *queries,
        TensorRow("attention/kv_down", "self_attn.kv_a_proj_with_mqa.weight", "c d -> d c", pairs),
        TensorRow("attention/latent_norm/scale", "self_attn.kv_a_layernorm.weight", "c -> c"),
        TensorRow("attention/key_value", "self_attn.kv_b_proj.weight", "(H n) c -> c H n"),
        TensorRow("attention/out", "self_attn.o_proj.weight", "d (H v) -> H v d"),
    )


def latent_attention(hf: Fields) -> MultiHeadLatent:
    """The attention of both generations."""
    refuse_other(hf, attention_bias=False)
    return MultiHeadLatent(
        **{ours: required(hf, theirs) for ours, theirs in _WIDTHS.items()},
        query_rank=hf.get("q_lora_rank") or 0,
        rotary_base=float(llama_like.rotary(hf)["rope_theta"]),
        norm_epsilon=_LATENT_EPSILON,
        rotary_scaling=_rotary_scaling(hf),
    )


def _rotary_scaling(hf: Fields) -> RotaryScaling:
    parameters = llama_like.rotary(hf)
    if parameters["rope_type"] == "default":
        return RotaryScaling()
    if parameters["rope_type"] != "yarn":
        raise UserError(
            f"config.json has rotary positions of type {parameters['rope_type']!r}; supported for "
            f"{hf['model_type']} are 'default' and 'yarn'."
        )
    return RotaryScaling(
        **{name: parameters.get(key, default) for name, (key, default) in _SCALING.items()}
    )


def latent_fields(attention: MultiHeadLatent) -> dict[str, Any]:
    """The inverse of `latent_attention`."""
    rotary = {"rope_theta": attention.rotary_base, "rope_type": "default"}
    if attention.rotary_scaling.factor != 1:
        rotary["rope_type"] = "yarn"
        rotary |= {
            key: getattr(attention.rotary_scaling, name) for name, (key, _) in _SCALING.items()
        }
    return {
        **{theirs: getattr(attention, ours) for ours, theirs in _WIDTHS.items()},
        "q_lora_rank": attention.query_rank or None,
        "attention_bias": False,
        "rope_theta": attention.rotary_base,
        "rope_parameters": rotary,
    }


def model_fields(hf: Fields, router: TokenChoice) -> dict[str, Any]:
    """Fields of `DecoderLMConfig` that both generations have."""
    layers, dense = required(hf, "num_hidden_layers"), hf.get("first_k_dense_replace", 0)
    refuse_other(hf, moe_layer_freq=1)
    moe = dropless_moe(
        router, llama_like.feed_forward(hf), shared_experts=hf.get("n_shared_experts") or 0
    )
    return {
        **llama_like.model_fields(hf),
        **moe_blocks(list(range(dense, layers)), layers),
        "mlp_width": required(hf, "intermediate_size"),
        "expert_width": required(hf, "moe_intermediate_size"),
        "attention": latent_attention(hf),
        "num_experts": required(hf, "n_routed_experts"),
        "moe": moe,
    }


def hf_fields(config: DecoderLMConfig, model_type: str, architecture: str) -> dict[str, Any]:
    """The inverse of `model_fields`, but for the router."""
    attention = component(config.attention, MultiHeadLatent, "model.attention", model_type)
    blocks = config.moe_layers
    return {
        **llama_like.hf_fields(config, model_type, architecture),
        **latent_fields(attention),
        "num_key_value_heads": config.num_heads,
        "first_k_dense_replace": blocks[0] if blocks else config.num_layers,
        "moe_layer_freq": 1,
        "intermediate_size": config.mlp_width,
        "moe_intermediate_size": config.expert_width or config.mlp_width,
        "n_routed_experts": config.num_experts,
        "n_shared_experts": config.moe.shared_experts or None,
    }


def config_from_hf(hf: Fields) -> DecoderLMConfig:
    """See `Family`."""
    # transformers does not read norm_topk_prob of this family.
    refuse_other(hf, mlp_bias=False, scoring_func="softmax")
    return DecoderLMConfig(**model_fields(hf, _router(hf)))


def _router(hf: Fields) -> TopK | DeepSeekV2:
    k, scale = required(hf, "num_experts_per_tok"), hf.get("routed_scaling_factor", 1.0)
    method = hf.get("topk_method", _GREEDY)
    if method == _GREEDY:
        return TopK(k=k, gate_scale=scale, losses=Losses())
    if method == _LIMITED:
        groups = Losses(devices=hf["n_group"], devices_per_token=hf["topk_group"])
        return DeepSeekV2(k=k, gate_scale=scale, losses=groups)
    raise UserError(
        f"config.json has topk_method={method!r}; supported are {_GREEDY} and {_LIMITED}."
    )


def config_to_hf(config: DecoderLMConfig) -> dict[str, Any]:
    """See `Family`."""
    router = config.moe.router
    method = {"topk_method": _GREEDY, "n_group": 1, "topk_group": 1}
    if isinstance(router, DeepSeekV2):
        method = {
            "topk_method": _LIMITED,
            "n_group": router.losses.devices,
            "topk_group": router.losses.devices_per_token,
        }
        k, scale = router.k, router.gate_scale
    else:
        top_k = component(router, TopK, "model.moe.router", "deepseek_v2")
        k, scale = top_k.k, top_k.gate_scale
    return {
        **hf_fields(config, "deepseek_v2", "DeepseekV2ForCausalLM"),
        **method,
        "num_experts_per_tok": k,
        "routed_scaling_factor": scale,
        "norm_topk_prob": False,
    }


def tensors(config: DecoderLMConfig) -> list[Tensor]:
    """See `Family`."""
    attention = component(config.attention, MultiHeadLatent, "model.attention", "deepseek_v2")
    return llama_like.tensors(config, attention_rows(attention), SPARSE)


FAMILY = Family("deepseek_v2", config_from_hf, config_to_hf, tensors, llama_like.IGNORED)
