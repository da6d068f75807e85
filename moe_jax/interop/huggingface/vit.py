"""Vision Transformer (Dosovitskiy et al. 2020): `ViTForImageClassification`.

Images are [B, channels, height, width] there and [B, height, width, channels] here.
"""

from typing import Any

from moe_jax.errors import UserError
from moe_jax.interop.huggingface.family import (
    Family,
    activation,
    activation_name,
    component,
    copied_back,
)
from moe_jax.interop.huggingface.fields import (
    MOST_LAYERS,
    Fields,
    check_no_pruning,
    compute_dtype,
    shortened,
)
from moe_jax.interop.huggingface.table import Tensor, TensorRow, of_blocks, of_model
from moe_jax.layers.attention import MultiHead, Positions
from moe_jax.layers.feed_forward import FeedForwardForm
from moe_jax.models.vision import VisionConfig

_EMBEDDINGS = "vit.embeddings."

_MODEL = (
    TensorRow("class_token", f"{_EMBEDDINGS}cls_token", "1 1 d -> d"),
    TensorRow("positions/table", f"{_EMBEDDINGS}position_embeddings", "1 L d -> L d"),
    TensorRow(
        "patches/kernel",
        f"{_EMBEDDINGS}patch_embeddings.projection.weight",
        "d channels row column -> row column channels d",
    ),
    TensorRow("patches/bias", f"{_EMBEDDINGS}patch_embeddings.projection.bias", "d -> d"),
    TensorRow("norm/scale", "vit.layernorm.weight", "d -> d"),
    TensorRow("norm/bias", "vit.layernorm.bias", "d -> d"),
    TensorRow("head/kernel", "classifier.weight", "V d -> d V"),
    TensorRow("head/bias", "classifier.bias", "V -> V"),
)

_BLOCK = (
    TensorRow("attention_norm/scale", "layernorm_before.weight", "d -> d"),
    TensorRow("attention_norm/bias", "layernorm_before.bias", "d -> d"),
    TensorRow("attention/qkv[:,0]", "attention.attention.query.weight", "(H h) d -> d H h"),
    TensorRow("attention/qkv[:,1]", "attention.attention.key.weight", "(H h) d -> d H h"),
    TensorRow("attention/qkv[:,2]", "attention.attention.value.weight", "(H h) d -> d H h"),
    TensorRow("attention/qkv_bias[0]", "attention.attention.query.bias", "(H h) -> H h"),
    TensorRow("attention/qkv_bias[1]", "attention.attention.key.bias", "(H h) -> H h"),
    TensorRow("attention/qkv_bias[2]", "attention.attention.value.bias", "(H h) -> H h"),
    TensorRow("attention/out", "attention.output.dense.weight", "d (H h) -> H h d"),
    TensorRow("attention/out_bias", "attention.output.dense.bias", "d -> d"),
    TensorRow("mlp_norm/scale", "layernorm_after.weight", "d -> d"),
    TensorRow("mlp_norm/bias", "layernorm_after.bias", "d -> d"),
    TensorRow("mlp/w_in", "intermediate.dense.weight", "f d -> d f"),
    TensorRow("mlp/b_in", "intermediate.dense.bias", "f -> f"),
    TensorRow("mlp/w_out", "output.dense.weight", "d f -> f d"),
    TensorRow("mlp/b_out", "output.dense.bias", "d -> d"),
)

_NAMES = {
    "width": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
    "norm_epsilon": "layer_norm_eps",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "channels": "num_channels",
}


# Of masked images, of a pooler that classification does not have, or names of classes.
# Initial values of training are ours.
_IRRELEVANT = frozenset(
    {
        "encoder_stride",
        "initializer_range",
        "label2id",
        "pooler_act",
        "pooler_output_size",
        "tie_word_embeddings",
    }
)

# Names inside of a block as transformers 5 has them in memory, and as it writes them.
_RENAMED = (
    (r"^vit\.layers\.(\d+)\.", r"vit.encoder.layer.\1."),
    (r"^(vit\.encoder\.layer\.\d+\.attention\.)q_proj\.", r"\1attention.query."),
    (r"^(vit\.encoder\.layer\.\d+\.attention\.)k_proj\.", r"\1attention.key."),
    (r"^(vit\.encoder\.layer\.\d+\.attention\.)v_proj\.", r"\1attention.value."),
    (r"^(vit\.encoder\.layer\.\d+\.attention\.)o_proj\.", r"\1output.dense."),
    (r"^(vit\.encoder\.layer\.\d+\.)mlp\.fc1\.", r"\1intermediate.dense."),
    (r"^(vit\.encoder\.layer\.\d+\.)mlp\.fc2\.", r"\1output.dense."),
)


def read(fields: Fields) -> VisionConfig:
    """See `Family`."""
    check_no_pruning(fields)
    fields.only("attention_probs_dropout_prob", 0.0)
    fields.only("is_encoder_decoder", False, None)
    width, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    fields.only("head_dim", width // heads, None)
    return VisionConfig(
        width=width,
        num_heads=heads,
        head_width=width // heads,
        num_layers=fields.integer("num_hidden_layers", at_most=MOST_LAYERS),
        mlp_width=fields.integer("intermediate_size"),
        norm_epsilon=fields.number("layer_norm_eps", 1e-12, at_least=0),
        image_size=_square(fields, "image_size", 224),
        patch_size=_square(fields, "patch_size", 16),
        channels=fields.integer("num_channels", 3),
        attention=MultiHead(
            positions=Positions.NONE, qkv_bias=fields.flag("qkv_bias", True), out_bias=True
        ),
        feed_forward=FeedForwardForm(activation(fields, "hidden_act", "gelu"), bias=True),
        moe_every=0,
        dropout=fields.number("hidden_dropout_prob", 0.0, at_least=0),
        num_classes=_num_classes(fields),
        dtype=compute_dtype(fields),
    )


def _square(fields: Fields, name: str, default: int) -> int:
    """A side; config.json may have both of a square.

    Raises:
      UserError: it is no square.
    """
    value = fields.raw(name, default)
    if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
        return Fields({"model_type": fields.model_type, name: value[0]}).integer(name)
    return fields.integer(name, default)


def _num_classes(fields: Fields) -> int:
    """As many as there are labels; two, which transformers does not write, where it has none.

    Raises:
      UserError: there are none, or `num_labels` says another number.
    """
    labels, number = fields.raw("id2label"), fields.raw("num_labels")
    if labels is None:
        return 2 if number is None else fields.integer("num_labels")
    if not isinstance(labels, dict) or not labels:
        raise UserError(
            f"config.json has id2label={shortened(labels)}, but a vit needs the names of its classes; "
            "correct it."
        )
    if number is not None and number != len(labels):
        raise UserError(
            f"config.json has num_labels={shortened(number)}, but id2label has {len(labels)}; correct one."
        )
    return len(labels)


def config_to_hf(config: VisionConfig) -> dict[str, Any]:
    """See `Family`."""
    attention = component(config.attention, MultiHead, "model.attention", "vit")
    labels = [f"LABEL_{i}" for i in range(config.num_classes)]
    return {
        **copied_back(config, _NAMES),
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        "qkv_bias": attention.qkv_bias,
        "hidden_act": activation_name(config.feed_forward.activation),
        "hidden_dropout_prob": config.dropout,
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
        "dtype": config.dtype.value,
    }


def tensors(config: VisionConfig) -> list[Tensor]:
    """See `Family`."""
    return [
        *of_model(_MODEL),
        *of_blocks(config, "stack", "vit.encoder.layer.{layer}.", _BLOCK, (), ()),
    ]


FAMILY = Family("vit", read, config_to_hf, tensors, irrelevant=_IRRELEVANT, renamed=_RENAMED)
