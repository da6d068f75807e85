"""Counts of decoder-only language models.

Axis letters: L sequence length, d width, V vocabulary.
"""

import dataclasses

from moe_jax.analysis.accounting.costs import Accounting, count
from moe_jax.analysis.accounting.stack import of_stack
from moe_jax.errors import UserError
from moe_jax.models.abstract_model import AbstractModel
from moe_jax.models.decoder_lm import DecoderLMConfig
from moe_jax.models.interface import ModelConfig


def account(config: DecoderLMConfig, length: int) -> Accounting:
    """Counts a decoder on sequences of `length` tokens, per token."""
    shapes = AbstractModel.of(config).shapes
    parameters = count(shapes)
    cost = of_stack(config, shapes["stack"])
    logits = 2.0 * config.vocab_size * config.width
    seen = length if config.bidirectional else (length + 1) / 2
    return Accounting(
        parameters,
        round(parameters - cost.unvisited_parameters),
        logits + cost.algorithmic(seen),
        logits + cost.executed(length),
        "token",
    )


def dense_twin(config: ModelConfig) -> DecoderLMConfig:
    """The dense model of equal algorithmic FLOPs per token: one expert everywhere.

    Raises:
      UserError: it is no decoder, or K is not 1, where equal blocks do not give equal FLOPs.
    """
    if not isinstance(config, DecoderLMConfig):
        raise UserError(
            f"model is {type(config).__name__}; a dense twin is made of a DecoderLMConfig."
        )
    if config.moe.router.choices != 1:
        raise UserError(
            f"router.k is {config.moe.router.choices}; a dense twin of equal FLOPs needs k=1."
        )
    return dataclasses.replace(config, moe_every=0, moe_at=())
