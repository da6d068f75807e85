"""Prediction of masked tokens from both sides, for routers that cannot be causal.

Axis letters: B batch, L length, D domains.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.data.pipelines import TextData
from moe_jax.errors import UserError
from moe_jax.layers.mode import Mode
from moe_jax.models.decoder_lm import DecoderLMConfig
from moe_jax.tasks.auxiliary import auxiliary_loss
from moe_jax.tasks.language_modeling import TextTask, prediction_sums, token_losses
from moe_jax.tasks.task import Batch, Metrics, Sums


@dataclasses.dataclass
class MaskedLanguageModeling(TextTask):
    """Mean cross-entropy in nats per masked token, plus the routers' losses (BERT, section 3.1).

    Every masked token is replaced by `mask_id`. Evaluation masks the same positions in every batch.

    Attributes:
      mask_rate: chance of each token to be masked (BERT: 0.15).
      mask_id: vocabulary id that stands for a masked token; 259 is the first after the bytes'.
        Subwords have none to spare: ask the tokenizer for one with extra_ids=1.
    """

    mask_rate: float = 0.15
    mask_id: int = 259

    def validate(self, model: DecoderLMConfig, data: TextData) -> None:
        """Raises UserError for fields out of range or a model that sees one side only."""
        super().validate(model, data)
        if not 0 < self.mask_rate < 1:
            raise UserError(f"task.mask_rate is {self.mask_rate}; it must be between 0 and 1.")
        if not 0 <= self.mask_id < model.vocab_size:
            raise UserError(
                f"task.mask_id is {self.mask_id}, which is not below "
                f"model.vocab_size={model.vocab_size}; raise the latter."
            )
        first_free = data.tokenizer.vocab_size - data.tokenizer.extra_ids
        if self.mask_id < first_free:
            raise UserError(
                f"task.mask_id is {self.mask_id}, which the tokenizer uses for text; use a number "
                f"from {first_free} (data.tokenizer.extra_ids keeps some free)."
            )
        if not (isinstance(model, DecoderLMConfig) and model.bidirectional):
            raise UserError(
                "model.bidirectional is false, but masked tokens are predicted from both sides; set "
                "it to true."
            )

    def training_loss(self, model: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        """See `Task`."""
        _, model_key = jax.random.split(key)
        targets, masked = batch["tokens"][:, :-1], self._training_mask(batch, key)
        tokens = jnp.where(masked, self.mask_id, targets)
        logits, reports, _ = model(tokens, None, Mode.TRAIN, model_key)
        losses = token_losses(logits, targets) * masked
        loss = losses.sum() / jnp.maximum(masked.sum(), 1)
        auxiliary = auxiliary_loss(reports, self.auxiliary_reduction)
        return loss + auxiliary, {"loss": loss, "auxiliary_loss": auxiliary, "router": reports}

    def num_targets(self, batch: Batch, key: jax.Array) -> jax.Array:
        """See `Task`: masked tokens."""
        return self._training_mask(batch, key).sum(dtype=jnp.float32)

    def _training_mask(self, batch: Batch, key: jax.Array) -> jax.Array:
        """[B, L] bool, the tokens that are masked in a step."""
        mask_key, _ = jax.random.split(key)
        return jax.random.bernoulli(mask_key, self.mask_rate, batch["tokens"][:, :-1].shape)

    def evaluation_tokens(self, batch: Batch) -> jax.Array:
        """All but the last token of each row, some of them masked."""
        tokens = batch["tokens"][:, :-1]
        return jnp.where(self._evaluation_mask(tokens), self.mask_id, tokens)

    def _evaluation_mask(self, tokens: jax.Array) -> jax.Array:
        return jax.random.bernoulli(jax.random.key(0), self.mask_rate, tokens.shape)

    def evaluation_sums(self, model: Any, batch: Batch, num_domains: int) -> Sums:
        """See `Task`: loss and accuracy per masked token."""
        targets = batch["tokens"][:, :-1]
        real = jnp.broadcast_to(batch["mask"][:, None], targets.shape)
        logits, _, _ = model(self.evaluation_tokens(batch), real, Mode.EVALUATE)
        masked = self._evaluation_mask(targets)
        return prediction_sums(logits, targets, real & masked, batch["domain"], num_domains)
