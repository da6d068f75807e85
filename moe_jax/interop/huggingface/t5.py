"""T5 v1.0 and v1.1 (Raffel et al. 2020, Shazeer 2020): `T5ForConditionalGeneration`."""

import copy
from typing import Any

from moe_jax.errors import UserError
from moe_jax.interop.huggingface.family import (
    Family,
    Fields,
    component,
    compute_dtype,
    refuse_other,
    required,
)
from moe_jax.interop.huggingface.table import Tensor, TensorRow, of_blocks, of_model
from moe_jax.layers.attention import MultiHead, Positions
from moe_jax.layers.embedding import EmbeddingScaling
from moe_jax.layers.feed_forward import Activation, FeedForwardForm
from moe_jax.models.encoder_decoder import EncoderDecoderConfig
from moe_jax.models.stack import StackConfig

_RELATIVE = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"

MODEL = (
    TensorRow("inputs/table", "shared.weight", "V d -> V d"),
    TensorRow("inputs/output", "lm_head.weight", "V d -> V d"),
    TensorRow("encoder/relative/table", f"encoder.{_RELATIVE}", "R H -> R H"),
    TensorRow("decoder/relative/table", f"decoder.{_RELATIVE}", "R H -> R H"),
    TensorRow("encoder_norm/scale", "encoder.final_layer_norm.weight", "d -> d"),
    TensorRow("decoder_norm/scale", "decoder.final_layer_norm.weight", "d -> d"),
)

_SELF_ATTENTION = (
    TensorRow("attention_norm/scale", "layer.0.layer_norm.weight", "d -> d"),
    TensorRow("attention/qkv[:,0]", "layer.0.SelfAttention.q.weight", "(H h) d -> d H h"),
    TensorRow("attention/qkv[:,1]", "layer.0.SelfAttention.k.weight", "(H h) d -> d H h"),
    TensorRow("attention/qkv[:,2]", "layer.0.SelfAttention.v.weight", "(H h) d -> d H h"),
    TensorRow("attention/out", "layer.0.SelfAttention.o.weight", "d (H h) -> H h d"),
)

_CROSS_ATTENTION = (
    TensorRow("cross_norm/scale", "layer.1.layer_norm.weight", "d -> d"),
    TensorRow("cross_attention/query", "layer.1.EncDecAttention.q.weight", "(H h) d -> d H h"),
    TensorRow(
        "cross_attention/key_value[:,0]", "layer.1.EncDecAttention.k.weight", "(H h) d -> d H h"
    ),
    TensorRow(
        "cross_attention/key_value[:,1]", "layer.1.EncDecAttention.v.weight", "(H h) d -> d H h"
    ),
    TensorRow("cross_attention/out", "layer.1.EncDecAttention.o.weight", "d (H h) -> H h d"),
)

_DENSE = (
    TensorRow("mlp/w_in", "DenseReluDense.wi.weight", "f d -> d f"),
    TensorRow("mlp/w_out", "DenseReluDense.wo.weight", "d f -> f d"),
)

_GATED = (
    TensorRow("mlp/w_gate", "DenseReluDense.wi_0.weight", "f d -> d f"),
    TensorRow("mlp/w_in", "DenseReluDense.wi_1.weight", "f d -> d f"),
    TensorRow("mlp/w_out", "DenseReluDense.wo.weight", "d f -> f d"),
)

# feed_forward_proj, and what it means.
_FORMS = {
    "relu": FeedForwardForm(Activation.RELU),
    "gated-gelu": FeedForwardForm(Activation.GELU, gated=True),
    "gated-silu": FeedForwardForm(Activation.SILU, gated=True),
}

# Of tied tensors, and of a table that nothing reads; older checkpoints have them.
COPIES = (
    r"(encoder|decoder)\.embed_tokens\.weight|lm_head\.weight"
    r"|decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"
)


def stack_tensors(
    config: StackConfig, name: str, dense: tuple[TensorRow, ...], sparse: tuple[TensorRow, ...]
) -> list[Tensor]:
    """Of the blocks of a stack.

    Args:
      config: the stack.
      name: `encoder` or `decoder`.
      dense, sparse: rows of the last sublayer without its norm.
    """
    cross = _CROSS_ATTENTION if name == "decoder" else ()
    last = "layer.2." if cross else "layer.1."
    norm = TensorRow("mlp_norm/scale", f"{last}layer_norm.weight", "d -> d")
    return of_blocks(
        config,
        name,
        f"{name}.block.{{layer}}.",
        (*_SELF_ATTENTION, *cross, norm),
        [row._replace(theirs=last + row.theirs) for row in dense],
        [row._replace(theirs=last + row.theirs) for row in sparse],
    )


def stack_fields(hf: Fields) -> dict[str, Any]:
    """Fields of both stacks.

    Raises:
      UserError: config.json asks for relative positions that ours are not.
    """
    refuse_other(hf, relative_attention_num_buckets=32, relative_attention_max_distance=128)
    return {
        "width": required(hf, "d_model"),
        "num_heads": required(hf, "num_heads"),
        "head_width": required(hf, "d_kv"),
        "mlp_width": required(hf, "d_ff"),
        "attention": MultiHead(positions=Positions.RELATIVE, scaled=False),
        "norm_epsilon": hf.get("layer_norm_epsilon", 1e-6),
        "dropout": hf.get("dropout_rate", 0.0),
        "dtype": compute_dtype(hf),
    }


def embedding_fields(hf: Fields, tied: bool) -> dict[str, Any]:
    """Fields of the tables; if they are tied, logits are divided by sqrt(d)."""
    return {
        "vocab_size": required(hf, "vocab_size"),
        "tied": tied,
        "embedding_scaling": EmbeddingScaling.LOGITS if tied else EmbeddingScaling.NONE,
    }


def hf_fields(config: EncoderDecoderConfig, model_type: str, architecture: str) -> dict[str, Any]:
    """The inverse of `stack_fields` and `embedding_fields`.

    Raises:
      UserError: the stacks' attention is not T5's.
    """
    encoder = config.encoder
    component(encoder.attention, MultiHead, "model.encoder.attention", model_type)
    component(config.decoder.attention, MultiHead, "model.decoder.attention", model_type)
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "is_encoder_decoder": True,
        "vocab_size": config.vocab_size,
        "d_model": encoder.width,
        "d_kv": encoder.head_width,
        "d_ff": encoder.mlp_width,
        "num_heads": encoder.num_heads,
        "num_layers": encoder.num_layers,
        "num_decoder_layers": config.decoder.num_layers,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": encoder.norm_epsilon,
        "dropout_rate": encoder.dropout,
        "tie_word_embeddings": config.tied,
        "dtype": encoder.dtype.value,
        "decoder_start_token_id": 0,
    }


def config_from_hf(hf: Fields) -> EncoderDecoderConfig:
    """See `Family`.

    Raises:
      UserError: config.json asks for what is not supported.
    """
    form = hf.get("feed_forward_proj", "relu")
    if form not in _FORMS:
        raise UserError(
            f"config.json has feed_forward_proj={form!r}; supported are {', '.join(_FORMS)}."
        )
    fields = stack_fields(hf) | {"feed_forward": _FORMS[form], "moe_every": 0}
    # Of own objects, so that a change of one stack leaves the other.
    encoder = StackConfig(**copy.deepcopy(fields), num_layers=required(hf, "num_layers"))
    layers = hf.get("num_decoder_layers") or encoder.num_layers
    # Models that transformers 5 writes all say that they are tied; those with an output layer of
    # their own do not scale.
    tied = hf.get("scale_decoder_outputs", hf.get("tie_word_embeddings", True))
    return EncoderDecoderConfig(
        **embedding_fields(hf, tied),
        encoder=encoder,
        decoder=StackConfig(**copy.deepcopy(fields), num_layers=layers),
    )


def config_to_hf(config: EncoderDecoderConfig) -> dict[str, Any]:
    """See `Family`.

    Raises:
      UserError: the feed-forward layers are not T5's.
    """
    form = config.encoder.feed_forward
    names = [name for name, value in _FORMS.items() if value == form]
    if not names:
        raise UserError(
            f"model.encoder.feed_forward is {form}, but t5 has {', '.join(_FORMS)} only; change it or "
            "choose another family."
        )
    return {
        **hf_fields(config, "t5", "T5ForConditionalGeneration"),
        "feed_forward_proj": names[0],
        "scale_decoder_outputs": config.tied,
    }


def tensors(config: EncoderDecoderConfig) -> list[Tensor]:
    """See `Family`."""
    rows = _GATED if config.encoder.feed_forward.gated else _DENSE
    return [
        *of_model(MODEL),
        *stack_tensors(config.encoder, "encoder", rows, ()),
        *stack_tensors(config.decoder, "decoder", rows, ()),
    ]


FAMILY = Family("t5", config_from_hf, config_to_hf, tensors, COPIES)
