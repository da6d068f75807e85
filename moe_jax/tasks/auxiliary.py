"""The routers' losses of all MoE layers as one number."""

import enum
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from moe_jax.layers.moe import MoEReport


class LayerReduction(enum.StrEnum):
    """How auxiliary losses of several MoE layers become one number.

    SUM: Mesh TensorFlow (Switch, GShard), V-MoE, DeepSeek. MEAN: flaxformer/t5x, MegaBlocks (OLMoE).
    (transformers does neither: it joins the tokens of all layers first and then takes one product of
    fractions and probabilities.)
    """

    SUM = "sum"
    MEAN = "mean"


def auxiliary_loss(
    reports: Sequence[MoEReport], weights: Mapping[str, float], reduction: LayerReduction
) -> jax.Array:
    """The losses times their coefficients, added up; 0 for a dense model.

    Args:
      reports: one for each stage of the model, each with a leading axis over layers.
      weights: coefficient by name of loss.
      reduction: over all layers.

    Returns:
      [] float32.
    """
    reduce = jnp.sum if reduction == LayerReduction.SUM else jnp.mean
    total = jnp.zeros(())
    for name in reports[0].losses if reports else ():
        layers = jnp.concatenate([report.losses[name] for report in reports])
        total = total + weights[name] * reduce(layers)
    return total
