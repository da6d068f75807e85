"""DeepSeek-V3 (2024): `DeepseekV3ForCausalLM`, without the modules that predict further tokens.

Neither transformers' model nor ours has those modules: their tensors are not read, and a model that
is saved lacks them.
"""

from typing import Any

from moe_jax.interop.huggingface import deepseek_v2, llama_like
from moe_jax.interop.huggingface.family import Family, Fields, component, refuse_other, required
from moe_jax.interop.huggingface.table import Tensor, TensorRow
from moe_jax.layers.latent_attention import MultiHeadLatent
from moe_jax.models.decoder_lm import DecoderLMConfig
from moe_jax.routing.deepseek import DeepSeekV3
from moe_jax.routing.losses import Losses

_SPARSE = (
    *deepseek_v2.SPARSE,
    TensorRow("mlp/router_state/bias", "mlp.gate.e_score_correction_bias", "E -> E"),
)


def config_from_hf(hf: Fields) -> DecoderLMConfig:
    """See `Family`."""
    refuse_other(hf, rope_interleave=True, scoring_func="sigmoid", topk_method="noaux_tc")
    router = DeepSeekV3(
        k=required(hf, "num_experts_per_tok"),
        groups=hf.get("n_group", 8),
        groups_per_token=hf.get("topk_group", 4),
        renormalize=hf.get("norm_topk_prob", True),
        gate_scale=hf.get("routed_scaling_factor", 2.5),
        losses=Losses(),
    )
    return DecoderLMConfig(**deepseek_v2.model_fields(hf, router))


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


# The modules that predict further tokens come after the 61 layers of the released model.
_IGNORED = rf"{llama_like.IGNORED}|model\.layers\.61\..*"

FAMILY = Family("deepseek_v3", config_from_hf, config_to_hf, tensors, _IGNORED)
