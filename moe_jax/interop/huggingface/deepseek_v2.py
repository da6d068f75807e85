"""DeepSeek-V2 and V2-Lite (2024): `DeepseekV2ForCausalLM`."""

from typing import Any

from moe_jax.errors import UserError
from moe_jax.interop.huggingface import llama_like, ties
from moe_jax.interop.huggingface.family import Family, component, dropless_moe, moe_blocks
from moe_jax.interop.huggingface.fields import MOST_EXPERTS, REQUIRED, Fields
from moe_jax.interop.huggingface.rotary import read_rotary, rotary_fields
from moe_jax.interop.huggingface.table import Tensor, TensorRow
from moe_jax.layers.latent_attention import MultiHeadLatent
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

# The norms of the compressed vectors have transformers' default, whatever rms_norm_eps is.
_LATENT_EPSILON = 1e-6

_GREEDY, _LIMITED = "greedy", "group_limited_greedy"

# Of the authors' own training code, or what transformers computes from other fields.
IRRELEVANT = llama_like.IRRELEVANT | {
    "aux_loss_alpha", "ep_size", "qk_head_dim", "seq_aux", "use_mla"
}  # fmt: skip


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


def latent_attention(fields: Fields) -> MultiHeadLatent:
    """The attention of both generations.

    Raises:
      UserError: biases, shared heads, or rotary positions that are not supported.
    """
    fields.only("attention_bias", False)
    fields.only("num_key_value_heads", fields.integer("num_attention_heads"), None)
    widths = {ours: fields.integer(theirs) for ours, theirs in _WIDTHS.items()}
    rotary_width = widths["rotary_width"]
    if rotary_width % 2:
        raise UserError(
            f"config.json has qk_rope_head_dim={rotary_width}; rotary positions need an even width."
        )
    # What is rotated, in these families.
    fields.only("head_dim", rotary_width, None)
    base, scaling = read_rotary(
        fields, 10_000.0, rotary_width, fields.integer("max_position_embeddings"), True
    )
    query_rank = fields.raw("q_lora_rank", 1536)
    return MultiHeadLatent(
        **widths,
        query_rank=0 if query_rank is None else fields.integer("q_lora_rank", 1536),
        rotary_base=base,
        norm_epsilon=_LATENT_EPSILON,
        rotary_scaling=scaling,
    )


def latent_fields(attention: MultiHeadLatent) -> dict[str, Any]:
    """The inverse of `latent_attention`."""
    return {
        **{theirs: getattr(attention, ours) for ours, theirs in _WIDTHS.items()},
        "q_lora_rank": attention.query_rank or None,
        "attention_bias": False,
        **rotary_fields(attention.rotary_base, attention.rotary_scaling, True),
    }


def model_fields(
    fields: Fields, router: TokenChoice, dense: int, shared: int, routed: int
) -> dict[str, Any]:
    """Fields of `DecoderLMConfig` that both generations have.

    Args:
      fields: config.json.
      router: of the MoEs.
      dense: the family's default of `first_k_dense_replace`.
      shared: of `n_shared_experts`.
      routed: of `n_routed_experts`.

    Raises:
      UserError: config.json asks for what is not supported.
    """
    fields.only("moe_layer_freq", 1, None)
    model = llama_like.model_fields(fields)
    layers = model["num_layers"]
    first = min(fields.integer("first_k_dense_replace", dense, at_least=0), layers)
    # Null is none in the authors' own code.
    shared_experts = fields.raw("n_shared_experts", shared)
    if shared_experts is not None:
        shared_experts = fields.integer("n_shared_experts", shared, at_least=0)
    moe = dropless_moe(router, llama_like.feed_forward(fields), shared_experts=shared_experts or 0)
    return {
        **model,
        **moe_blocks(list(range(first, layers)), layers),
        "mlp_width": fields.integer("intermediate_size"),
        "expert_width": fields.integer("moe_intermediate_size"),
        "attention": latent_attention(fields),
        "num_experts": num_experts(fields, routed),
        "moe": moe,
    }


def num_experts(fields: Fields, default: int) -> int:
    """The settings of each MoE, without the shared ones."""
    return fields.integer("n_routed_experts", default, at_most=MOST_EXPERTS)


def groups(
    fields: Fields, experts: int, default_groups: Any, default_per_token: Any
) -> tuple[int, int]:
    """How many groups the experts are in, and from how many a token's come.

    Args:
      fields: config.json.
      experts: how many there are.
      default_groups, default_per_token: the family's.

    Raises:
      UserError: they cannot be, or have too few experts for a token.
    """
    count = fields.integer("n_group", default_groups)
    chosen = fields.integer("topk_group", default_per_token)
    k = fields.integer("num_experts_per_tok")
    if experts % count:
        raise UserError(
            f"config.json has n_group={count}, which does not divide n_routed_experts={experts}; "
            "correct it."
        )
    if chosen > count:
        raise UserError(f"config.json has topk_group={chosen}, but n_group={count}; correct it.")
    if k > chosen * (experts // count):
        raise UserError(
            f"config.json has num_experts_per_tok={k}, but topk_group={chosen} groups have "
            f"{chosen * (experts // count)} experts; correct it."
        )
    return count, chosen


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
        "n_shared_experts": config.moe.shared_experts,
    }


def read(fields: Fields) -> DecoderLMConfig:
    """See `Family`."""
    fields.only("mlp_bias", False)
    fields.only("scoring_func", "softmax", None)
    return DecoderLMConfig(**model_fields(fields, _router(fields), dense=0, shared=2, routed=64))


def _router(fields: Fields) -> TopK | DeepSeekV2:
    experts = num_experts(fields, 64)
    k = llama_like.experts_per_token(fields, fields.integer("num_experts_per_tok"), experts)
    scale = fields.number("routed_scaling_factor", 1.0)
    limited = fields.choice("topk_method", {_GREEDY: False, _LIMITED: True}, _GREEDY)
    if not limited:
        for name in ("n_group", "topk_group"):  # Only of the other method.
            fields.raw(name)
        return TopK(k=k, gate_scale=scale, losses=Losses())
    count, chosen = groups(fields, experts, REQUIRED, REQUIRED)
    return DeepSeekV2(k=k, gate_scale=scale, losses=Losses(devices=count, devices_per_token=chosen))


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


FAMILY = Family(
    "deepseek_v2",
    read,
    config_to_hf,
    tensors,
    aliases={"num_experts": "n_routed_experts"},
    # The authors' code reads it, transformers does not.
    irrelevant=IRRELEVANT | {"norm_topk_prob"},
    tables=ties.of_decoder,
    experts=llama_like.EXPERTS,
    unread=llama_like.unread,
)
