"""Switch Transformer (Fedus et al. 2021): `SwitchTransformersForConditionalGeneration`.

Their models drop the tokens of a row beyond `expert_capacity` for an expert; ours drop none, and so are
the same for rows of at most so many tokens.
"""

from typing import Any

from moe_jax.errors import UserError
from moe_jax.interop.huggingface import t5, ties
from moe_jax.interop.huggingface.family import (
    Family,
    activation,
    activation_name,
    component,
    dropless_moe,
    moe_blocks,
)
from moe_jax.interop.huggingface.fields import MOST_EXPERTS, Fields
from moe_jax.interop.huggingface.table import Tensor, TensorRow
from moe_jax.layers.feed_forward import FeedForwardForm
from moe_jax.models.encoder_decoder import EncoderDecoderConfig
from moe_jax.models.stack import StackConfig
from moe_jax.routing.losses import Losses
from moe_jax.routing.scores import Exploration
from moe_jax.routing.token_choice import TopK

_DENSE = (
    TensorRow("mlp/w_in", "mlp.wi.weight", "f d -> d f"),
    TensorRow("mlp/w_out", "mlp.wo.weight", "d f -> f d"),
)

_SPARSE = (
    TensorRow("mlp/router/weights", "mlp.router.classifier.weight", "E d -> d E"),
    TensorRow("mlp/w_in[{expert}]", "mlp.experts.expert_{expert}.wi.weight", "f d -> d f"),
    TensorRow("mlp/w_out[{expert}]", "mlp.experts.expert_{expert}.wo.weight", "d f -> f d"),
)

# More tokens than any row has, so that theirs drop none either.
_NO_DROPS = 2**31 - 1


# Weights of losses, what is returned, and fields of the authors' first code that no version reads.
_IRRELEVANT = t5.IRRELEVANT | {
    "add_router_probs", "router_ignore_padding_tokens", "router_type", "router_z_loss_coef"
}  # fmt: skip


def _step(num_layers: int, num_sparse: int) -> int:
    """The interval between blocks with a MoE, as their constructor computes it."""
    return num_layers // num_sparse if num_sparse else num_layers


def _sparse_blocks(num_layers: int, step: int) -> list[int]:
    """Indices of the blocks with a MoE.

    For no MoE at all the step is meant to be `num_layers`, but block 1 of several gets one.
    """
    return [block for block in range(num_layers) if step == 1 or (step > 1 and block % step == 1)]


def read(fields: Fields) -> EncoderDecoderConfig:
    """See `Family`."""
    fields.only("router_bias", False)
    fields.only("router_dtype", "float32")
    fields.only("is_gated_act", False, None)
    fields.only("feed_forward_proj", "relu", fields.raw("dense_act_fn"), None)
    fields.integer("expert_capacity", 64)
    act = activation(fields, "dense_act_fn", "relu")
    jitter = fields.number("router_jitter_noise", 0.01, at_least=0)
    exploration = Exploration.JITTER if jitter else Exploration.ARGMAX
    stacks = {}
    layers_of = dict(
        zip(("encoder", "decoder"), t5.layers_of_stacks(fields, default_decoder=12), strict=True)
    )
    for name, layers in layers_of.items():
        sparse = fields.integer(f"num_sparse_{name}_layers", 3, at_least=0)
        # Computed from the other unless config.json has it, as what transformers writes does.
        step = fields.integer(f"{name}_sparse_step", _step(layers, sparse), at_least=0)
        router = TopK(k=1, losses=Losses(), exploration=exploration, exploration_rate=jitter)
        stacks[name] = StackConfig(
            **t5.stack_fields(fields),
            **moe_blocks(_sparse_blocks(layers, step), layers),
            num_layers=layers,
            num_experts=fields.integer("num_experts", 8, at_most=MOST_EXPERTS),
            feed_forward=FeedForwardForm(act),
            moe=dropless_moe(router, FeedForwardForm(act)),
        )
    tied = fields.flag("tie_word_embeddings", True)
    return EncoderDecoderConfig(
        **t5.embedding_fields(fields, tied), encoder=stacks["encoder"], decoder=stacks["decoder"]
    )


def config_to_hf(config: EncoderDecoderConfig) -> dict[str, Any]:
    """See `Family`.

    Raises:
      UserError: no setting places the MoE blocks as ours are.
    """
    router = component(
        config.encoder.moe.router, TopK, "model.encoder.moe.router", "switch_transformers"
    )
    sparse = {}
    for name, stack in (("encoder", config.encoder), ("decoder", config.decoder)):
        layers, blocks = stack.num_layers, stack.moe_layers
        # 0 last, because that is not what it says.
        fitting = [
            n
            for n in (*range(1, layers + 1), 0)
            if _sparse_blocks(layers, _step(layers, n)) == blocks
        ]
        if not fitting:
            raise UserError(
                f"model.{name} has a MoE in blocks {blocks}, but switch_transformers has them in "
                "every n-th block from 1 on; change moe_at or choose another family."
            )
        sparse[f"num_sparse_{name}_layers"] = fitting[0]
    return {
        **t5.hf_fields(config, "switch_transformers", "SwitchTransformersForConditionalGeneration"),
        **sparse,
        "dense_act_fn": activation_name(config.encoder.feed_forward.activation),
        "num_experts": config.encoder.num_experts,
        "expert_capacity": _NO_DROPS,
        "router_bias": False,
        "router_jitter_noise": router.exploration_rate,
    }


def tensors(config: EncoderDecoderConfig) -> list[Tensor]:
    """See `Family`."""
    return [
        *t5.model_tensors(config),
        *t5.stack_tensors(config.encoder, "encoder", _DENSE, _SPARSE),
        *t5.stack_tensors(config.decoder, "decoder", _DENSE, _SPARSE),
    ]


def _copies(config: EncoderDecoderConfig) -> dict[str, str]:
    """Untied, transformers 5 takes each stack's table by its own name, and 4 both by `shared`."""
    if config.tied or config.target_vocab_size:
        return {}
    return {ties.ENCODER: ties.SHARED, ties.DECODER: ties.SHARED}


FAMILY = Family(
    "switch_transformers",
    read,
    config_to_hf,
    tensors,
    aliases=t5.ALIASES,
    irrelevant=_IRRELEVANT,
    tables=ties.of_encoder_decoder,
    copies=_copies,
    unread=t5.unread,
    tokens=t5.TOKENS,
)
