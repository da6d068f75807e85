"""Counts of recurrent translators.

Axis letters: M source length, L target length, E experts, d width, n attention width, V vocabulary.
"""

from collections.abc import Mapping
from typing import Any

from moe_jax.analysis.accounting.costs import Accounting, count
from moe_jax.analysis.accounting.recurrent_lm import (
    not_visited,
    of_lstm,
    of_machine,
    of_paper,
)
from moe_jax.models.abstract_model import AbstractModel
from moe_jax.models.recurrent_translator import RecurrentTranslatorConfig


def account(
    config: RecurrentTranslatorConfig, source_length: int, target_length: int
) -> Accounting:
    """Counts the model, per sequence pair of M and L tokens."""
    shapes = AbstractModel.of(config).shapes
    moes = {half: shapes[f"{half}_moe"]["moe"] for half in _halves(config)}
    length = {"encoder": source_length, "decoder": target_length}
    common = (
        source_length * (_encoder(shapes) + count(shapes["attentive"]["w_memory"]))
        + target_length * (_decoder(shapes) + count(shapes["attentive"]["w_output"]))
        + target_length * source_length * (config.attention_width + config.width)
        + target_length * config.vocab_size * config.width
    )
    of = (config.moe, config.num_experts)
    parameters = count(shapes)
    return Accounting(
        parameters,
        round(parameters - sum(not_visited(*of, moe) for moe in moes.values())),
        2.0 * (common + sum(length[half] * of_paper(*of, moe) for half, moe in moes.items())),
        2.0 * (common + sum(length[half] * of_machine(*of, moe) for half, moe in moes.items())),
        "sequence",
    )


def operations_per_timestep(config: RecurrentTranslatorConfig) -> float:
    """Multiply-adds of one source and one target token, with the output layer.

    The attention function is left out: its cost grows with the source, and without it the sum rounds
    to both of the paper's figures, 85M and, with many experts that are four times as wide, 102M.
    (GNMT's 214M are such a sum too: 180.4M of its LSTMs and 33.6M of its output layer.)
    """
    shapes = AbstractModel.of(config).shapes
    moes = (shapes[f"{half}_moe"]["moe"] for half in _halves(config))
    return (
        _encoder(shapes)
        + _decoder(shapes)
        + config.vocab_size * config.width
        + sum(of_paper(config.moe, config.num_experts, moe) for moe in moes)
    )


def _halves(config: RecurrentTranslatorConfig) -> tuple[str, ...]:
    """The halves that have a MoE."""
    return ("encoder", "decoder") if config.sparse else ()


def _encoder(shapes: Mapping[str, Any]) -> int:
    return sum(of_lstm(shapes[name]) for name in ("forward", "backward", "encoder"))


def _decoder(shapes: Mapping[str, Any]) -> int:
    attentive = shapes["attentive"]
    return of_lstm(attentive["lstm"]) + count(attentive["w_context"]) + of_lstm(shapes["decoder"])
