"""Switch Transformer (Fedus et al. 2021): `SwitchTransformersForConditionalGeneration`.

Their models drop the tokens of a row beyond `expert_capacity` for an expert; ours drop none.
"""

from typing import Any

from moe_jax.errors import UserError
from moe_jax.interop.huggingface import t5
from moe_jax.interop.huggingface.family import (
    Family,
    Fields,
    activation,
    activation_name,
    component,
    dropless_moe,
    moe_blocks,
    refuse_other,
    required,
)
from moe_jax.interop.huggingface.table import Tensor, TensorRow, of_model
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


def _sparse_blocks(num_layers: int, num_sparse: int) -> list[int]:
    """Indices of the blocks with a MoE, as their constructor places them.

    It means to place none where `num_sparse` is 0, but block 1 of several gets one.
    """
    step = num_layers // num_sparse if num_sparse else num_layers
    return [block for block in range(num_layers) if step == 1 or (step > 1 and block % step == 1)]


def config_from_hf(hf: Fields) -> EncoderDecoderConfig:
    """See `Family`."""
    refuse_other(hf, router_bias=False)
    act = activation(hf, "dense_act_fn")
    jitter = float(hf.get("router_jitter_noise", 0.0))
    exploration = Exploration.JITTER if jitter else Exploration.ARGMAX
    encoder_layers = required(hf, "num_layers")
    decoder_layers = hf.get("num_decoder_layers") or encoder_layers
    stacks = {}
    for name, layers in (("encoder", encoder_layers), ("decoder", decoder_layers)):
        blocks = _sparse_blocks(layers, required(hf, f"num_sparse_{name}_layers"))
        router = TopK(k=1, losses=Losses(), exploration=exploration, exploration_rate=jitter)
        stacks[name] = StackConfig(
            **t5.stack_fields(hf),
            **moe_blocks(blocks, layers),
            num_layers=layers,
            num_experts=required(hf, "num_experts"),
            feed_forward=FeedForwardForm(act),
            moe=dropless_moe(router, FeedForwardForm(act)),
        )
    tied = hf.get("tie_word_embeddings", True)
    return EncoderDecoderConfig(
        **t5.embedding_fields(hf, tied), encoder=stacks["encoder"], decoder=stacks["decoder"]
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
        fitting = [n for n in (*range(1, layers + 1), 0) if _sparse_blocks(layers, n) == blocks]
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
        *of_model(t5.MODEL),
        *t5.stack_tensors(config.encoder, "encoder", _DENSE, _SPARSE),
        *t5.stack_tensors(config.decoder, "decoder", _DENSE, _SPARSE),
    ]


FAMILY = Family("switch_transformers", config_from_hf, config_to_hf, tensors, t5.COPIES)
