"""DeepSeek-V3 (2024): `DeepseekV3ForCausalLM`, without the modules that predict further tokens.

Neither transformers' model nor ours computes anything with those modules: their tensors are not read,
and a model that is saved lacks them.
"""

import re
from collections.abc import Mapping
from typing import Any

from moe_jax.interop.huggingface import deepseek_v2, llama_like, ties
from moe_jax.interop.huggingface.family import Family, component
from moe_jax.interop.huggingface.fields import Fields
from moe_jax.interop.huggingface.files import Stored
from moe_jax.interop.huggingface.table import Tensor, TensorRow
from moe_jax.layers.latent_attention import MultiHeadLatent
from moe_jax.models.decoder_lm import DecoderLMConfig
from moe_jax.routing.deepseek import DeepSeekV3
from moe_jax.routing.losses import Losses

_SPARSE = (
    *deepseek_v2.SPARSE,
    TensorRow("mlp/router_state/bias", "mlp.gate.e_score_correction_bias", "E -> E"),
)


def read(fields: Fields) -> DecoderLMConfig:
    """See `Family`."""
    fields.only("rope_interleave", True)
    fields.only("scoring_func", "sigmoid", None)
    fields.only("topk_method", "noaux_tc", None)
    experts = deepseek_v2.num_experts(fields, 256)
    count, chosen = deepseek_v2.groups(fields, experts, 8, 4)
    router = DeepSeekV3(
        k=llama_like.experts_per_token(fields, 8, experts),
        groups=count,
        groups_per_token=chosen,
        renormalize=fields.flag("norm_topk_prob", True),
        gate_scale=fields.number("routed_scaling_factor", 2.5),
        losses=Losses(),
    )
    return DecoderLMConfig(
        **deepseek_v2.model_fields(fields, router, dense=3, shared=1, routed=256)
    )


def config_to_hf(config: DecoderLMConfig) -> dict[str, Any]:
    """See `Family`."""
    router = component(config.moe.router, DeepSeekV3, "model.moe.router", "deepseek_v3")
    return {
        **deepseek_v2.hf_fields(config, "deepseek_v3", "DeepseekV3ForCausalLM"),
        "num_experts_per_tok": router.k,
        "n_group": router.groups,
        "topk_group": router.groups_per_token,
        "norm_topk_prob": router.renormalize,
        "routed_scaling_factor": router.gate_scale,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "rope_interleave": True,
        "num_nextn_predict_layers": 0,
    }


def tensors(config: DecoderLMConfig) -> list[Tensor]:
    """See `Family`."""
    attention = component(config.attention, MultiHeadLatent, "model.attention", "deepseek_v3")
    return llama_like.tensors(config, deepseek_v2.attention_rows(attention), _SPARSE)


_LAYER = re.compile(r"model\.layers\.(\d+)\..*")


def unread(config: DecoderLMConfig, stored: Mapping[str, Stored]) -> set[str]:
    """Modules that predict further tokens: layers after the last that join two vectors first."""
    found = llama_like.unread(config, stored)
    for name in stored:
        match = _LAYER.fullmatch(name)
        if match is None or int(match[1]) < config.num_layers:
            continue
        if f"model.layers.{match[1]}.eh_proj.weight" in stored:
            found.add(name)
    return found


FAMILY = Family(
    "deepseek_v3",
    read,
    config_to_hf,
    tensors,
    aliases={
        "num_local_experts": "n_routed_experts",
        "num_mtp_layers": "num_nextn_predict_layers",
    },
    # `unread` goes by the tensors.
    irrelevant=deepseek_v2.IRRELEVANT | {"num_nextn_predict_layers"},
    tables=ties.of_decoder,
    experts=llama_like.EXPERTS,
    unread=unread,
)
