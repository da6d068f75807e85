"""T5 v1.0 and v1.1 (Raffel et al. 2020, Shazeer 2020): `T5ForConditionalGeneration`."""

import copy
from collections.abc import Mapping
from typing import Any

from moe_jax.errors import UserError
from moe_jax.interop.huggingface import ties
from moe_jax.interop.huggingface.family import ACTIVATIONS, Family, activation_name, component
from moe_jax.interop.huggingface.fields import (
    LABELS,
    MOST_LAYERS,
    Fields,
    check_encoder_decoder,
    compute_dtype,
    shortened,
)
from moe_jax.interop.huggingface.files import Stored
from moe_jax.interop.huggingface.table import Tensor, TensorRow, of_blocks, of_model
from moe_jax.layers.attention import MultiHead, Positions
from moe_jax.layers.embedding import EmbeddingScaling
from moe_jax.layers.feed_forward import FeedForwardForm
from moe_jax.models.encoder_decoder import EncoderDecoderConfig
from moe_jax.models.stack import StackConfig

_RELATIVE = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"

_MODEL = (
    TensorRow("encoder/relative/table", f"encoder.{_RELATIVE}", "R H -> R H"),
    TensorRow("decoder/relative/table", f"decoder.{_RELATIVE}", "R H -> R H"),
    TensorRow("encoder_norm/scale", "encoder.final_layer_norm.weight", "d -> d"),
    TensorRow("decoder_norm/scale", "decoder.final_layer_norm.weight", "d -> d"),
)

_ONE_TABLE = (
    TensorRow("inputs/table", ties.SHARED, "V d -> V d"),
    TensorRow("inputs/output", ties.HEAD, "V d -> V d"),
)

_TWO_TABLES = (
    TensorRow("inputs/table", ties.ENCODER, "V d -> V d"),
    TensorRow("targets/table", ties.DECODER, "V d -> V d"),
    TensorRow("targets/output", ties.HEAD, "V d -> V d"),
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

# Nothing reads it: cross-attention has no positions. The released T5 v1.0 has it.
_UNREAD = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"

# Of training, of models with classes, of stacks that are always as they are here, or of the authors'
# own code.
IRRELEVANT = LABELS | {
    "add_cross_attention", "classifier_dropout", "cross_attention_hidden_size",
    "initializer_factor", "n_positions",
}  # fmt: skip


def model_tensors(config: EncoderDecoderConfig) -> list[Tensor]:
    """The tensors outside of blocks."""
    tables = _TWO_TABLES if config.target_vocab_size else _ONE_TABLE
    return of_model((*tables, *_MODEL))


def unread(_: EncoderDecoderConfig, stored: Mapping[str, Stored]) -> set[str]:
    """See `Family`."""
    return {_UNREAD} & stored.keys()


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


def stack_fields(fields: Fields) -> dict[str, Any]:
    """Fields of both stacks.

    Raises:
      UserError: config.json asks for relative positions that ours are not.
    """
    check_encoder_decoder(fields)
    fields.only("relative_attention_num_buckets", 32)
    fields.only("relative_attention_max_distance", 128)
    return {
        "width": fields.integer("d_model"),
        "num_heads": fields.integer("num_heads"),
        "head_width": fields.integer("d_kv"),
        "mlp_width": fields.integer("d_ff"),
        "attention": MultiHead(positions=Positions.RELATIVE, scaled=False),
        "norm_epsilon": fields.number("layer_norm_epsilon", 1e-6, at_least=0),
        "dropout": fields.number("dropout_rate", 0.1, at_least=0),
        "dtype": compute_dtype(fields),
    }


def layers_of_stacks(fields: Fields, default_decoder: int | None = None) -> tuple[int, int]:
    """Blocks of the encoder and of the decoder, which has as many if config.json has null for it."""
    encoder = fields.integer("num_layers", at_most=MOST_LAYERS)
    if fields.raw("num_decoder_layers", default_decoder) is None:
        return encoder, encoder
    return encoder, fields.integer("num_decoder_layers", default_decoder, at_most=MOST_LAYERS)


def embedding_fields(fields: Fields, tied: bool) -> dict[str, Any]:
    """Fields of the tables; if they are tied, logits are divided by sqrt(d)."""
    return {
        "vocab_size": fields.integer("vocab_size"),
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
        # transformers 4 scales by this field, and 5 by `scale_decoder_outputs` where it is there.
        "tie_word_embeddings": config.embedding_scaling == EmbeddingScaling.LOGITS,
        "dtype": encoder.dtype.value,
        "decoder_start_token_id": 0,
    }


def read(fields: Fields) -> EncoderDecoderConfig:
    """See `Family`.

    Raises:
      UserError: config.json asks for what is not supported.
    """
    stack = stack_fields(fields) | {"feed_forward": _feed_forward(fields), "moe_every": 0}
    encoder, decoder = layers_of_stacks(fields)
    # Models that transformers 5 writes all say that they are tied; those with an output layer of
    # their own do not scale. `ties.of_encoder_decoder` compares the tables.
    tied = fields.flag("tie_word_embeddings", True)
    scaled = fields.flag("scale_decoder_outputs", tied)
    # Of own objects, so that a change of one stack leaves the other.
    return EncoderDecoderConfig(
        **embedding_fields(fields, scaled),
        encoder=StackConfig(**copy.deepcopy(stack), num_layers=encoder),
        decoder=StackConfig(**copy.deepcopy(stack), num_layers=decoder),
    )


def _feed_forward(fields: Fields) -> FeedForwardForm:
    """Activation and gate of `feed_forward_proj`.

    What transformers derives from it takes its place where it is given.

    Raises:
      UserError: it is not supported.
    """
    name = fields.raw("feed_forward_proj", "relu")
    first, _, last = str(name).rpartition("-")
    if first not in ("", "gated") or last not in ACTIVATIONS:
        raise UserError(
            f"config.json has feed_forward_proj={shortened(name)}; supported are "
            f"{', '.join(ACTIVATIONS)}, also with gated- before."
        )
    return FeedForwardForm(
        activation=fields.choice(
            "dense_act_fn", ACTIVATIONS, "gelu_new" if name == "gated-gelu" else last
        ),
        gated=fields.flag("is_gated_act", first == "gated"),
    )


def config_to_hf(config: EncoderDecoderConfig) -> dict[str, Any]:
    """See `Family`."""
    form = config.encoder.feed_forward
    name = activation_name(form.activation)
    written = "gelu" if name == "gelu_new" and form.gated else name
    return {
        **hf_fields(config, "t5", "T5ForConditionalGeneration"),
        "feed_forward_proj": f"gated-{written}" if form.gated else written,
        "dense_act_fn": name,
        "is_gated_act": form.gated,
        "scale_decoder_outputs": config.embedding_scaling == EmbeddingScaling.LOGITS,
    }


def tensors(config: EncoderDecoderConfig) -> list[Tensor]:
    """See `Family`."""
    rows = _GATED if config.encoder.feed_forward.gated else _DENSE
    return [
        *model_tensors(config),
        *stack_tensors(config.encoder, "encoder", rows, ()),
        *stack_tensors(config.decoder, "decoder", rows, ()),
    ]


def tables(config: EncoderDecoderConfig, stored: Mapping[str, Stored]) -> ties.Tables:
    """See `Family`."""
    return ties.of_encoder_decoder(config, stored, always_tied=True)


def _copies(config: EncoderDecoderConfig) -> dict[str, str]:
    """To transformers 4 a model that does not scale has an output layer of its own."""
    scaled = config.embedding_scaling == EmbeddingScaling.LOGITS
    return {ties.HEAD: ties.SHARED} if config.tied and not scaled else {}


# Further names of fields, as transformers has them for all encoder-decoders.
ALIASES = {
    "hidden_size": "d_model",
    "num_attention_heads": "num_heads",
    "num_hidden_layers": "num_layers",
}

# As transformers' config classes have them; none says what a target begins with.
TOKENS = {"is_encoder_decoder": True, "pad_token_id": 0, "eos_token_id": 1}

FAMILY = Family(
    "t5",
    read,
    config_to_hf,
    tensors,
    aliases=ALIASES | {"head_dim": "d_kv"},
    irrelevant=IRRELEVANT,
    tables=tables,
    copies=_copies,
    # As transformers keeps them in float32 then, because what comes of them is large.
    not_in_float16=("mlp/w_out",),
    unread=unread,
    tokens=TOKENS,
)
