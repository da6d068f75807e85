"""What the trainer asks of a task."""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from moe_jax.models.decoder_lm import DecoderLMConfig

Batch = Mapping[str, jax.Array]


@dataclasses.dataclass
class Task(abc.ABC):
    """A loss for training and sums for evaluation; a component of a config."""

    def validate(self, model: DecoderLMConfig) -> None:  # noqa: B027 - not every task has fields.
        """Raises UserError where the fields cannot work, also not with this model."""

    @abc.abstractmethod
    def training_loss(
        self, model: Any, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, dict[str, Any]]:
        """The loss to minimise.

        Args:
          model: the model.
          batch: tokens [B, L + 1] int32 without padding.
          key: PRNG key of the step.

        Returns:
          [] float32 loss, and metrics: `loss` (cross-entropy alone), `auxiliary_loss`, `router`
          (the MoE layers' reports, one for each stage with a leading axis over its layers).
        """

    @abc.abstractmethod
    def evaluation_tokens(self, batch: Batch) -> jax.Array:
        """[B, L] int32, what the model reads in evaluation."""

    @abc.abstractmethod
    def evaluation_sums(
        self, model: Any, batch: Batch, num_domains: int
    ) -> tuple[jax.Array, jax.Array]:
        """Cross-entropy per domain as sums, so that batches can be added up exactly.

        Args:
          model: the model.
          batch: tokens [B, L + 1] int32, domain [B] int32, mask [B] bool (False: a row that only
            fills the batch).
          num_domains: D.

        Returns:
          [D] summed loss in nats and [D] number of tokens that were predicted, float32.
        """
