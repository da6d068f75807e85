"""Vision Transformer (Dosovitskiy et al. 2020): `ViTForImageClassification`.

Images are [B, channels, height, width] there and [B, height, width, channels] here.
"""

from typing import Any

from moe_jax.interop.huggingface.family import (
    Family,
    Fields,
    activation,
    activation_name,
    component,
    compute_dtype,
    copied,
    copied_back,
    refuse_other,
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


def config_from_hf(hf: Fields) -> VisionConfig:
    """See `Family`."""
    refuse_other(hf, attention_probs_dropout_prob=0.0)
    return VisionConfig(
        **copied(hf, _NAMES),
        head_width=hf["hidden_size"] // hf["num_attention_heads"],
        attention=MultiHead(
            positions=Positions.NONE, qkv_bias=hf.get("qkv_bias", True), out_bias=True
        ),
        feed_forward=FeedForwardForm(activation(hf, "hidden_act"), bias=True),
        moe_every=0,
        dropout=hf.get("hidden_dropout_prob", 0.0),
        # transformers writes no labels where there are two, its default.
        num_classes=len(hf.get("id2label", ("0", "1"))),
        dtype=compute_dtype(hf),
    )


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


FAMILY = Family("vit", config_from_hf, config_to_hf, tensors)
