"""What the decoders share that are made like Llama: names of tensors, and fields of config.json."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from moe_jax.errors import UserError
from moe_jax.interop.huggingface import files
from moe_jax.interop.huggingface.family import activation, activation_name, copied_back
from moe_jax.interop.huggingface.fields import (
    LABELS,
    MOST_LAYERS,
    Fields,
    check_decoder,
    compute_dtype,
    shortened,
)
from moe_jax.interop.huggingface.files import Stored
from moe_jax.interop.huggingface.rotary import read_rotary
from moe_jax.interop.huggingface.table import Tensor, TensorRow, of_blocks, of_model
from moe_jax.layers.attention import MultiHead
from moe_jax.layers.embedding import EmbeddingScaling
from moe_jax.layers.feed_forward import FeedForwardForm
from moe_jax.layers.latent_attention import MultiHeadLatent
from moe_jax.layers.positions import RotaryScaling
from moe_jax.models.decoder_lm import DecoderLMConfig
from moe_jax.routing.losses import Losses
from moe_jax.routing.token_choice import TopK

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

# An expert's tensors in `SPARSE`: see `Family.experts`.
EXPERTS = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")

_FREQUENCIES = re.compile(r".*\.rotary_emb\.inv_freq")
# Saved in 16 bits, perhaps.
_TOLERANCE = 1e-2

# Fields that change training only or nothing at all, in decoders.
IRRELEVANT = LABELS

# Their name of each of our fields.
_NAMES = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "max_length": "max_position_embeddings",
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


def unread(config: DecoderLMConfig, stored: Mapping[str, Stored]) -> set[str]:
    """Frequencies of rotary positions, which older checkpoints have, where they are config.json's."""
    attention = config.attention
    if isinstance(attention, MultiHeadLatent):
        half = attention.rotary_width // 2
    elif isinstance(attention, MultiHead):
        half = config.head_width // 2
    else:
        return set()
    expected = [
        np.asarray(scaling.frequencies(half, attention.rotary_base))
        for scaling in (RotaryScaling(), attention.rotary_scaling)
    ]
    found = set()
    for name, tensor in stored.items():
        if _FREQUENCIES.fullmatch(name) and tensor.shape == (half,):
            values = files.read(tensor, (slice(0, half),)).astype(np.float32)
            if any(np.allclose(values, right, rtol=_TOLERANCE, atol=0) for right in expected):
                found.add(name)
    return found


def feed_forward(fields: Fields) -> FeedForwardForm:
    """Gated, as all of them."""
    return FeedForwardForm(activation=activation(fields, "hidden_act", "silu"), gated=True)


def model_fields(fields: Fields, norm_epsilon: float = 1e-6) -> dict[str, Any]:
    """Fields of `DecoderLMConfig` that all have in common.

    Args:
      fields: config.json.
      norm_epsilon: the family's default.
    """
    check_decoder(fields)
    fields.only("attention_dropout", 0.0, None)
    return {
        **{ours: fields.integer(theirs) for ours, theirs in _NAMES.items() if ours != "num_layers"},
        "num_layers": num_layers(fields),
        "norm_epsilon": fields.number("rms_norm_eps", norm_epsilon, at_least=0),
        "feed_forward": feed_forward(fields),
        "tied": fields.flag("tie_word_embeddings", False),
        "embedding_scaling": EmbeddingScaling.NONE,
        "init_deviation": fields.number("initializer_range", 0.02, at_least=0),
        "dtype": compute_dtype(fields),
    }


def num_layers(fields: Fields) -> int:
    """How many blocks, of which there are no millions."""
    return fields.integer("num_hidden_layers", at_most=MOST_LAYERS)


def hf_fields(config: DecoderLMConfig, model_type: str, architecture: str) -> dict[str, Any]:
    """The inverse of `model_fields`."""
    return {
        **copied_back(config, _NAMES),
        "rms_norm_eps": config.norm_epsilon,
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_act": activation_name(config.feed_forward.activation),
        "tie_word_embeddings": config.tied,
        **({"initializer_range": config.init_deviation} if config.init_deviation else {}),
        "dtype": config.dtype.value,
        "use_cache": True,
    }


def head_width(fields: Fields) -> int:
    """Given, or as many as the heads share."""
    share = fields.integer("hidden_size") // fields.integer("num_attention_heads")
    if fields.raw("head_dim") is None:
        return share
    return fields.integer("head_dim")


def heads(fields: Fields, default_kv_heads: int | None, base: float = 10_000.0) -> dict[str, Any]:
    """Fields of `MultiHead` that all with it have in common.

    Args:
      fields: config.json.
      default_kv_heads: the family's heads of keys and values; None for as many as queries'.
      base: the family's default of rotary positions.

    Raises:
      UserError: heads that cannot be shared, or rotary positions that are not supported.
    """
    queries = fields.integer("num_attention_heads")
    given = fields.raw("num_key_value_heads", default_kv_heads)
    # A family whose default is null has as many as queries' for it.
    kv_heads = queries
    if given is not None or default_kv_heads is not None:
        kv_heads = fields.integer("num_key_value_heads", default_kv_heads)
    if queries % kv_heads:
        raise UserError(
            f"config.json has num_key_value_heads={kv_heads}, which does not divide "
            f"num_attention_heads={queries}; correct it."
        )
    width = head_width(fields)
    if width % 2:
        raise UserError(
            f"config.json gives heads of {width} numbers (head_dim, or hidden_size divided by "
            "num_attention_heads); rotary positions need an even width."
        )
    rotary_base, scaling = read_rotary(
        fields, base, width, fields.integer("max_position_embeddings"), False
    )
    return {"kv_heads": kv_heads, "rotary_base": rotary_base, "rotary_scaling": scaling}


def check_no_window(fields: Fields, used: bool = True) -> None:
    """Refuses attention to the last tokens only, unless that is all tokens of any text.

    Args:
      fields: config.json.
      used: whether the family reads `sliding_window`.

    Raises:
      UserError: a window is shorter than the longest text.
    """
    check_all_tokens(fields)
    window = fields.raw("sliding_window")
    if used and window is not None:
        longest = fields.integer("max_position_embeddings")
        if fields.integer("sliding_window", at_least=0) < longest:
            raise UserError(
                f"config.json has sliding_window={window}; only sliding_window=None, or one of at "
                f"least max_position_embeddings={longest}, is supported for {fields.model_type}."
            )


def check_all_tokens(fields: Fields) -> None:
    """Refuses kinds of attention that differ from layer to layer.

    Raises:
      UserError: a layer does not see all earlier tokens.
    """
    kinds = fields.raw("layer_types")
    if kinds is None:
        return
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise UserError(
            f"config.json has layer_types={shortened(kinds)}; only 'full_attention' is supported for "
            f"{fields.model_type}."
        )


def experts_per_token(fields: Fields, default: int, num_experts: int) -> int:
    """How many experts a token has.

    Raises:
      UserError: more than there are.
    """
    k = fields.integer("num_experts_per_tok", default)
    if k > num_experts:
        raise UserError(
            f"config.json has num_experts_per_tok={k}, but {num_experts} experts; correct it."
        )
    return k


def top_k(k: int, fields: Fields, renormalize: bool | None = None) -> TopK:
    """The router of the families without groups of experts.

    Args:
      k: experts per token.
      fields: config.json.
      renormalize: whether gates sum to 1; None where `norm_topk_prob` says it.
    """
    if renormalize is None:
        renormalize = fields.flag("norm_topk_prob", False)
    return TopK(k=k, renormalize=renormalize, losses=Losses())
