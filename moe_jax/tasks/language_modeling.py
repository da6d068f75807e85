"""Next-token prediction.

Axis letters: B batch, L length, V vocabulary, D domains.
"""

import dataclasses
import enum
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from moe_jax.layers.mode import Mode
from moe_jax.layers.moe import MoEReport
from moe_jax.models.decoder_lm import DecoderLM


class LayerReduction(enum.StrEnum):
    """How auxiliary losses of several MoE layers become one number.

    SUM: Mesh TensorFlow (Switch, GShard) and V-MoE. MEAN: flaxformer/t5x.
    """

    SUM = "sum"
    MEAN = "mean"


@dataclasses.dataclass
class LanguageModeling:
    """Mean cross-entropy in nats per token, plus the routers' losses times their coefficients.

    Attributes:
      auxiliary_reduction: over MoE layers.
    """

    auxiliary_reduction: LayerReduction = LayerReduction.SUM

    def training_loss(
        self, model: DecoderLM, batch: Mapping[str, jax.Array], key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array | MoEReport | None]]:
        """The loss to minimise.

        Args:
          model: the model.
          batch: tokens [B, L + 1] int32 without padding.
          key: PRNG key of the step.

        Returns:
          [] float32 loss, and metrics: `loss` (cross-entropy alone), `auxiliary_loss`, `router`
          (the MoE layers' report with a leading axis over layers, None for a dense model).
        """
        tokens = batch["tokens"]
        logits, report, _ = model(tokens[:, :-1], None, Mode.TRAIN, key)
        loss = token_losses(logits, tokens[:, 1:]).mean()
        auxiliary = jnp.zeros(())
        if report is not None:
            auxiliary = self._auxiliary_loss(report, model.config.moe.router.loss_weights)
        metrics = {"loss": loss, "auxiliary_loss": auxiliary, "router": report}
        return loss + auxiliary, metrics

    def _auxiliary_loss(self, report: MoEReport, weights: Mapping[str, float]) -> jax.Array:
        reduce = jnp.sum if self.auxiliary_reduction == LayerReduction.SUM else jnp.mean
        terms = [weights[name] * reduce(values) for name, values in report.losses.items()]
        return jnp.sum(jnp.stack(terms))

    def evaluation_sums(
        self, model: DecoderLM, batch: Mapping[str, jax.Array], num_domains: int
    ) -> tuple[jax.Array, jax.Array]:
        """Cross-entropy per domain as sums, so that batches can be added up exactly.

        Args:
          model: the model.
          batch: tokens [B, L + 1] int32, domain [B] int32, mask [B] bool (False: a row that only
            fills the batch).
          num_domains: D.

        Returns:
          [D] summed loss in nats and [D] number of tokens, float32.
        """
        tokens = batch["tokens"]
        mask = jnp.broadcast_to(batch["mask"][:, None], tokens[:, 1:].shape)
        logits, _, _ = model(tokens[:, :-1], mask, Mode.EVALUATE)
        losses = (token_losses(logits, tokens[:, 1:]) * mask).sum(axis=1)
        counts = mask.sum(axis=1).astype(jnp.float32)
        return (
            jax.ops.segment_sum(losses, batch["domain"], num_domains),
            jax.ops.segment_sum(counts, batch["domain"], num_domains),
        )


def token_losses(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """-log p(target) in nats: logits [B, L, V] float32, targets [B, L] int32, result [B, L]."""
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, targets)
