"""All families by the name that config.json has for them."""

from collections.abc import Mapping
from typing import Any

from moe_jax.errors import UserError
from moe_jax.interop.huggingface import (
    deepseek_v2,
    deepseek_v3,
    mixtral,
    olmoe,
    qwen2_moe,
    qwen3_moe,
    switch_transformers,
    t5,
    vit,
)
from moe_jax.interop.huggingface.family import Family
from moe_jax.interop.huggingface.fields import shortened

FAMILIES: dict[str, Family] = {
    module.FAMILY.model_type: module.FAMILY
    for module in (
        deepseek_v2,
        deepseek_v3,
        mixtral,
        olmoe,
        qwen2_moe,
        qwen3_moe,
        switch_transformers,
        t5,
        vit,
    )
}


def family_named(model_type: str) -> Family:
    """A family by name.

    Raises:
      UserError: there is none.
    """
    if model_type not in FAMILIES:
        raise UserError(
            f"model_type is {shortened(model_type)}; supported are {', '.join(sorted(FAMILIES))}."
        )
    return FAMILIES[model_type]


def family_of(hf: Mapping[str, Any]) -> Family:
    """The family of a config.json.

    Raises:
      UserError: it is not supported, or its weights are quantized.
    """
    if hf.get("quantization_config"):
        raise UserError(
            "config.json has a quantization_config; only float32, float16 and bfloat16 weights are "
            "supported."
        )
    return family_named(str(hf.get("model_type")))
