"""FLOPs of a whole training step: of any run's model, on the global batch of its data.

Forward and backward pass and what the backward pass recomputes; matrix products only, two operations
for a multiply-add. Optimizers make none.

Axis letters: B batch, M input length, L target length, d width, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from moe_jax.analysis.accounting import families
from moe_jax.analysis.accounting.costs import count
from moe_jax.analysis.accounting.machine import Machine
from moe_jax.analysis.accounting.moe_products import of_moe
from moe_jax.analysis.accounting.products import Cost, Product, cost
from moe_jax.analysis.accounting.recurrent_lm import of_lstm
from moe_jax.analysis.accounting.stack_products import TokenRows, of_stack
from moe_jax.layers.moe import MoEConfig
from moe_jax.models.abstract_model import AbstractModel
from moe_jax.models.decoder_lm import DecoderLMConfig
from moe_jax.models.encoder_decoder import EncoderDecoderConfig
from moe_jax.models.recurrent_lm import RecurrentLMConfig
from moe_jax.models.recurrent_translator import RecurrentTranslatorConfig
from moe_jax.models.stack import Remat
from moe_jax.models.vision import VisionConfig


@dataclasses.dataclass(frozen=True)
class TrainingFlops:
    """FLOPs of one step on the global batch, over all devices.

    Attributes:
      algorithmic: three forward passes as the papers count them, see `moe_jax.analysis.accounting`;
        model FLOPs utilisation is of these.
      executed: what the machine does where experts get equal numbers of tokens: also what it
        recomputes, empty slots, masked scores, and what all devices of `model` do alike.
      skipped: of rows that dropless buffers have room for beyond balance. Kernels pass over them,
        but their cost estimates, and so `moe_jax.analysis.hlo.Program.kernels`, count them.
    """

    algorithmic: float
    executed: float
    skipped: float


def training_flops(model: Any, data: Any, platform: str, mesh: Mapping[str, int]) -> TrainingFlops:
    """Counts a step.

    On CPUs dropless experts are counted as on other platforms, but work in another way: their FLOPs
    depend on the routing. The model is taken to run once: THOR's consistency loss
    (`task.consistency_weight`) runs it twice, which doubles the step and is not counted.

    Args:
      model: config of a model of any family that has counts.
      data: config of the data, for the rows of a batch and their lengths.
      platform: `cpu`, `gpu` or `tpu`, for the kernels that compute attention and experts.
      mesh: axis name -> size (`mesh.shape`).

    Raises:
      UserError: the family has no counts.
    """
    counted = families.account(model, data)
    units = data.batch_size * (data.tokens_per_row if counted.unit == "token" else 1)
    total = _cost(model, data, Machine(platform, mesh))
    return TrainingFlops(3 * units * counted.algorithmic_flops, total.executed, total.skipped)


@functools.singledispatch
def _cost(model: Any, data: Any, machine: Machine) -> Cost:
    """Of the families that `families.account` knows."""
    raise NotImplementedError(type(model).__name__)


@_cost.register
def _(model: DecoderLMConfig, data: Any, machine: Machine) -> Cost:
    shapes = AbstractModel.of(model).shapes
    rows = TokenRows(data.batch_size, data.sequence_length, causal=not model.bidirectional)
    logits = Product(2.0 * rows.tokens * model.vocab_size * model.width)
    return of_stack(model, shapes["stack"], rows, machine) + cost([[logits]])


@_cost.register
def _(model: EncoderDecoderConfig, data: Any, machine: Machine) -> Cost:
    shapes = AbstractModel.of(model).shapes
    inputs = TokenRows(data.batch_size, data.input_length, causal=False, padded=True)
    targets = TokenRows(
        data.batch_size, data.target_length, causal=True, memory=data.input_length, padded=True
    )
    logits = Product(2.0 * targets.tokens * model.output_vocab_size * model.decoder.width)
    return (
        of_stack(model.encoder, shapes["encoder"], inputs, machine)
        + of_stack(model.decoder, shapes["decoder"], targets, machine)
        + cost([[logits]])
    )


@_cost.register
def _(model: VisionConfig, data: Any, machine: Machine) -> Cost:
    shapes = AbstractModel.of(model).shapes
    rows = TokenRows(data.batch_size, model.num_tokens, causal=False)
    patches = 2.0 * data.batch_size * model.grid**2 * count(shapes["patches"]["kernel"])
    # One vector of each image is classified.
    head = sum(count(shapes[name]["kernel"]) for name in ("pre_logits", "head") if name in shapes)
    ends = (
        Product(patches, backward=1.0),  # Images have no gradient.
        Product(2.0 * data.batch_size * head),
    )
    return of_stack(model, shapes["stack"], rows, machine) + cost([ends])


@_cost.register
def _(model: RecurrentLMConfig, data: Any, machine: Machine) -> Cost:
    shapes = AbstractModel.of(model).shapes
    tokens = data.batch_size * data.sequence_length
    operations = sum(map(of_lstm, shapes["lstms"].values())) + count(shapes.get("dense", {}))
    operations += model.vocab_size * model.width
    moes = [(shapes["sigmoid_moe"]["moe"], tokens)] if model.sparse else []
    return cost([[Product(2.0 * tokens * operations)]]) + _of_recurrent_moes(model, moes, machine)


@_cost.register
def _(model: RecurrentTranslatorConfig, data: Any, machine: Machine) -> Cost:
    shapes = AbstractModel.of(model).shapes
    inputs, targets = (
        data.batch_size * length for length in (data.input_length, data.target_length)
    )
    attentive = shapes["attentive"]
    of_input = sum(of_lstm(shapes[name]) for name in ("forward", "backward", "encoder"))
    of_input += count(attentive["w_memory"])
    of_target = of_lstm(attentive["lstm"]) + of_lstm(shapes["decoder"])
    of_target += count(attentive["w_context"]) + count(attentive["w_output"])
    # Scores of all inputs, and their mean.
    of_target += data.input_length * (model.attention_width + model.width)
    of_target += model.vocab_size * model.width
    moes = [
        (shapes[f"{half}_moe"]["moe"], tokens)
        for half, tokens in (("encoder", inputs), ("decoder", targets))
        if model.sparse
    ]
    products = [Product(2.0 * inputs * of_input), Product(2.0 * targets * of_target)]
    return cost([products]) + _of_recurrent_moes(model, moes, machine)


def _of_recurrent_moes(
    model: RecurrentLMConfig | RecurrentTranslatorConfig,
    moes: Sequence[tuple[Any, int]],
    machine: Machine,
) -> Cost:
    """Of (parameters, tokens) of each MoE."""
    moe: MoEConfig = model.moe
    remat = Remat.FULL if model.remat_moe else Remat.NONE
    costs = [
        cost([of_moe(moe, model.num_experts, model.width, shapes, tokens, machine)], remat)
        for shapes, tokens in moes
    ]
    return sum(costs, start=Cost(0.0, 0.0))
