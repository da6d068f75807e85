"""What the decoders share that are made like Llama: names of tensors, and fields of config.json."""

from typing import Any

from moe_jax.errors import UserError
from moe_jax.interop.huggingface.family import (
    Fields,
    activation,
    activation_name,
    compute_dtype,
    copied,
    copied_back,
    refuse_other,
)
from moe_jax.interop.huggingface.table import Tensor, TensorRow, of_blocks, of_model
from moe_jax.layers.embedding import EmbeddingScaling
from moe_jax.layers.feed_forward import FeedForwardForm
from moe_jax.models.decoder_lm import DecoderLMConfig

MODEL = (
    TensorRow("tokens/table", "model.embed_tokens.weight", "V d -> V d"),
    TensorRow("tokens/output", "lm_head.weight", "V d -> V d"),
    TensorRow("norm/scale", "model.norm.weight", "d -> d"),
)

NORMS = (
    TensorRow("attention_norm/scale", "input_layernorm.weight", "d -> d"),
    TensorRow("mlp_norm/scale", "post_attention_layernorm.weight", "d -> d"),
)

ATTENTION = (
    TensorRow("attention/qkv[:,0]", "self_attn.q_proj.weight", "(H h) d -> d H h"),
    TensorRow("attention/qkv[:,1]", "self_attn.k_proj.weight", "(H h) d -> d H h"),
    TensorRow("attention/qkv[:,2]", "self_attn.v_proj.weight", "(H h) d -> d H h"),
    TensorRow("attention/query", "self_attn.q_proj.weight", "(H h) d -> d H h"),
    TensorRow("attention/key_value[:,0]", "self_attn.k_proj.weight", "(J h) d -> d J h"),
    TensorRow("attention/key_value[:,1]", "self_attn.v_proj.weight", "(J h) d -> d J h"),
    TensorRow("attention/qkv_bias[0]", "self_attn.q_proj.bias", "(H h) -> H h"),
    TensorRow("attention/qkv_bias[1]", "self_attn.k_proj.bias", "(H h) -> H h"),
    TensorRow("attention/qkv_bias[2]", "self_attn.v_proj.bias", "(H h) -> H h"),
    TensorRow("attention/query_bias", "self_attn.q_proj.bias", "(H h) -> H h"),
    TensorRow("attention/key_value_bias[0]", "self_attn.k_proj.bias", "(J h) -> J h"),
    TensorRow("attention/key_value_bias[1]", "self_attn.v_proj.bias", "(J h) -> J h"),
    TensorRow("attention/query_norm/scale", "self_attn.q_norm.weight", "h -> h"),
    TensorRow("attention/key_norm/scale", "self_attn.k_norm.weight", "h -> h"),
    TensorRow("attention/out", "self_attn.o_proj.weight", "d (H h) -> H h d"),
    TensorRow("attention/out_bias", "self_attn.o_proj.bias", "d -> d"),
)

DENSE = (
    TensorRow("mlp/w_gate", "mlp.gate_proj.weight", "f d -> d f"),
    TensorRow("mlp/w_in", "mlp.up_proj.weight", "f d -> d f"),
    TensorRow("mlp/w_out", "mlp.down_proj.weight", "d f -> f d"),
)

SPARSE = (
    TensorRow("mlp/router/weights", "mlp.gate.weight", "E d -> d E"),
    TensorRow("mlp/w_gate[{expert}]", "mlp.experts.{expert}.gate_proj.weight", "f d -> d f"),
    TensorRow("mlp/w_in[{expert}]", "mlp.experts.{expert}.up_proj.weight", "f d -> d f"),
    TensorRow("mlp/w_out[{expert}]", "mlp.experts.{expert}.down_proj.weight", "d f -> f d"),
)

# Frequencies of rotary positions, which older checkpoints have and config.json says.
IGNORED = r".*\.rotary_emb\.inv_freq"

_NAMES = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "max_length": "max_position_embeddings",
    "norm_epsilon": "rms_norm_eps",
}


def tensors(
    config: DecoderLMConfig,
    attention: tuple[TensorRow, ...] = ATTENTION,
    sparse: tuple[TensorRow, ...] = SPARSE,
) -> list[Tensor]:
    """All tensors, with a family's rows of attention or of its MoE."""
    blocks = of_blocks(
        config, "stack", "model.layers.{layer}.", (*NORMS, *attention), DENSE, sparse
    )
    return [*of_model(MODEL), *blocks]


def feed_forward(hf: Fields) -> FeedForwardForm:
    """Gated, as all of them."""
    return FeedForwardForm(activation=activation(hf, "hidden_act"), gated=True)


def model_fields(hf: Fields) -> dict[str, Any]:
    """Fields of `DecoderLMConfig` that all have in common."""
    refuse_other(hf, attention_dropout=0.0)
    return {
        **copied(hf, _NAMES),
        "feed_forward": feed_forward(hf),
        "tied": hf.get("tie_word_embeddings", False),
        "embedding_scaling": EmbeddingScaling.NONE,
        "init_deviation": hf.get("initializer_range", 0.02),
        "dtype": compute_dtype(hf),
    }


def hf_fields(config: DecoderLMConfig, model_type: str, architecture: str) -> dict[str, Any]:
    """The inverse of `model_fields`."""
    return {
        **copied_back(config, _NAMES),
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_act": activation_name(config.feed_forward.activation),
        "tie_word_embeddings": config.tied,
        **({"initializer_range": config.init_deviation} if config.init_deviation else {}),
        "dtype": config.dtype.value,
        "use_cache": True,
    }


def head_width(hf: Fields) -> int:
    """Given, or as many as the heads share."""
    return hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]


def rotary(hf: Fields) -> dict[str, Any]:
    """How positions are rotated: `rope_parameters` of transformers 5, or the fields of 4.

    Returns:
      with at least rope_theta and rope_type.
    """
    parameters = hf.get("rope_parameters") or {}
    scaling = hf.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    theta = hf.get("rope_theta", 10_000.0)
    return {"rope_theta": theta, "rope_type": kind} | scaling | parameters


def rotary_base(hf: Fields) -> float:
    """The base of plain rotary positions.

    Raises:
      UserError: they are scaled.
    """
    parameters = rotary(hf)
    if parameters["rope_type"] != "default":
        raise UserError(
            f"config.json has rotary positions of type {parameters['rope_type']!r}; only 'default' is "
            f"supported for {hf['model_type']}."
        )
    return float(parameters["rope_theta"])


def plain_rotary(base: float) -> dict[str, Any]:
    """The inverse of `rotary_base`, for transformers 4 and 5."""
    return {
        "rope_theta": base,
        "rope_parameters": {"rope_theta": base, "rope_type": "default"},
    }
