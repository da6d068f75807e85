"""Counts of encoder-decoders.

Axis letters: M input length, L target length, d width, V vocabulary of the targets.
"""

from moe_jax.analysis.accounting.costs import Accounting, count
from moe_jax.analysis.accounting.stack import of_stack
from moe_jax.models.abstract_model import AbstractModel
from moe_jax.models.encoder_decoder import EncoderDecoderConfig


def account(config: EncoderDecoderConfig, input_length: int, target_length: int) -> Accounting:
    """Counts a pair of `input_length` and `target_length` tokens, per sequence (the pair).

    Algorithmic FLOPs are counted as Switch (Table 9) and ST-MoE (Table 1) must have counted theirs,
    which do not say how: of the numbers that they print this gives most to the last digit. Of the
    two products of attention only one is counted, and cross-attention's keys and values as if they
    were computed of the targets. T5-Base has 124B so, and 142B if all is counted.
    """
    shapes = AbstractModel.of(config).shapes
    parameters = count(shapes)
    encoder = of_stack(config.encoder, shapes["encoder"])
    decoder = of_stack(config.decoder, shapes["decoder"])
    logits = 2.0 * config.output_vocab_size * config.decoder.width * target_length
    seen = (target_length + 1) / 2
    algorithmic = input_length * encoder.algorithmic(input_length / 2) + target_length * (
        decoder.algorithmic(seen / 2, input_length / 2) + 2.0 * decoder.memory_products
    )
    executed = input_length * (
        encoder.executed(input_length) + 2.0 * decoder.memory_products
    ) + target_length * decoder.executed(target_length, input_length)
    unvisited = encoder.unvisited_parameters + decoder.unvisited_parameters
    return Accounting(
        parameters,
        round(parameters - unvisited),
        logits + algorithmic,
        logits + executed,
        "sequence",
    )
