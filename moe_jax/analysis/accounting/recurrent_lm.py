"""Counts of recurrent language models.

Axis letters: A groups of experts, E experts, d width, V vocabulary.

Shazeer et al. (2017) count multiply-adds per time step of the forward pass without embedding and
output layer: of the LSTMs, of the experts that a token chose, and of the gates, of which a hierarchy
computes those of the chosen groups only. Here these are `operations_per_timestep`.
"""

from collections.abc import Mapping
from typing import Any

from moe_jax.analysis.accounting.costs import Accounting, count
from moe_jax.layers.moe import MoEConfig
from moe_jax.models.abstract_model import AbstractModel
from moe_jax.models.recurrent_lm import RecurrentLMConfig
from moe_jax.routing.noisy_top_k import HierarchicalNoisyTopK


def account(config: RecurrentLMConfig) -> Accounting:
    """Counts the model, per token; algorithmic FLOPs have the output layer and the paper's gates."""
    shapes = AbstractModel.of(config).shapes
    parameters, logits = count(shapes), config.vocab_size * config.width
    executed, unvisited = float(_products(shapes) + logits), 0.0
    if config.sparse:
        moe = shapes["sigmoid_moe"]["moe"]
        executed += of_machine(config.moe, config.num_experts, moe)
        unvisited = not_visited(config.moe, config.num_experts, moe)
    return Accounting(
        parameters,
        round(parameters - unvisited),
        2.0 * (_operations(config, shapes) + logits),
        2.0 * executed,
        "token",
    )


def parameters_without_embeddings(config: RecurrentLMConfig) -> int:
    """All but the embedding and the output layer, as in the paper's Tables 7 and 8."""
    shapes = AbstractModel.of(config).shapes
    return count(shapes) - count(shapes["tokens"])


def operations_per_timestep(config: RecurrentLMConfig) -> float:
    """Multiply-adds as the paper counts them."""
    return _operations(config, AbstractModel.of(config).shapes)


def _operations(config: RecurrentLMConfig, shapes: Mapping[str, Any]) -> float:
    operations = float(_products(shapes))
    if config.sparse:
        moe = shapes["sigmoid_moe"]["moe"]
        operations += of_paper(config.moe, config.num_experts, moe)
    return operations


def _products(shapes: Mapping[str, Any]) -> int:
    """Multiply-adds per token of the LSTMs and of a dense network."""
    return sum(map(of_lstm, shapes["lstms"].values())) + count(shapes.get("dense", {}))


def of_lstm(shapes: Mapping[str, Any]) -> int:
    """Multiply-adds per token: one for each parameter but the bias."""
    return count({name: leaf for name, leaf in shapes.items() if name != "bias"})


def of_paper(moe: MoEConfig, num_experts: int, shapes: Mapping[str, Any]) -> float:
    """Multiply-adds per token of a MoE's chosen experts and of its gates as the paper counts them."""
    return _visited(moe, num_experts) * _expert(moe, shapes, num_experts) + _gates(
        moe, shapes["router"]
    )


def of_machine(moe: MoEConfig, num_experts: int, shapes: Mapping[str, Any]) -> float:
    """Multiply-adds per token of all rows of all experts, and of all gates."""
    rows = moe.expert_rows(num_experts)
    return rows * _expert(moe, shapes, num_experts) + count(shapes["router"])


def not_visited(moe: MoEConfig, num_experts: int, shapes: Mapping[str, Any]) -> float:
    """Parameters of the experts that a token did not choose."""
    return (num_experts - _visited(moe, num_experts)) * _expert(moe, shapes, num_experts)


def _visited(moe: MoEConfig, num_experts: int) -> float:
    slots = moe.expert_capacity(num_experts, train=True)
    return moe.router.experts_per_token(moe.group_size, num_experts, slots)


def _expert(moe: MoEConfig, shapes: Mapping[str, Any], num_experts: int) -> int:
    """Parameters of one expert, biases left out."""
    names = [name for name in moe.expert_form.axes() if not name.startswith("b_")]
    return count({name: shapes[name] for name in names}) // num_experts


def _gates(moe: MoEConfig, router: Mapping[str, Any]) -> float:
    if not isinstance(moe.router, HierarchicalNoisyTopK):
        return count(router)
    secondary = count({name: leaf for name, leaf in router.items() if "secondary" in name})
    chosen = moe.router.groups_per_token / moe.router.groups
    return count(router) - (1 - chosen) * secondary
