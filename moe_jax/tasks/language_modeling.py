"""Next-token prediction.

Axis letters: B batch, L length, V vocabulary, D domains.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from moe_jax.errors import UserError
from moe_jax.layers.mode import Mode
from moe_jax.layers.moe import MoEReport
from moe_jax.models.decoder_lm import DecoderLM, DecoderLMConfig
from moe_jax.tasks.auxiliary import LayerReduction, auxiliary_loss
from moe_jax.tasks.task import Batch, Task

Metrics = dict[str, jax.Array | list[MoEReport]]


@dataclasses.dataclass
class LanguageModeling(Task):
    """Mean cross-entropy in nats per token, plus the routers' losses times their coefficients.

    Attributes:
      auxiliary_reduction: over MoE layers.
      consistency_weight: alpha of THOR's consistency loss (Zuo et al. 2021 eq. 4; 5.0 in its
        translation script); 0 trains as usual. Above 0 the model runs twice with other random
        experts, and the loss is the sum of both cross-entropies and alpha times the mean of the two
        Kullback-Leibler divergences between the predictions. Twice the cost.
    """

    auxiliary_reduction: LayerReduction = LayerReduction.SUM
    consistency_weight: float = 0.0

    def validate(self, model: DecoderLMConfig) -> None:
        """Raises UserError for a negative coefficient or a model that sees the next token."""
        if not self.consistency_weight >= 0:
            raise UserError(
                f"task.consistency_weight is {self.consistency_weight}; it must be at least 0."
            )
        experts = max(model.experts_of_layers, default=0)
        if self.consistency_weight and model.moe_every and model.moe.router.init_state(experts):
            raise UserError(
                f"task.consistency_weight is {self.consistency_weight}, which runs the model twice a "
                f"step, and {type(model.moe.router).__name__} moves its expert bias in every run; "
                "use another router or consistency_weight=0."
            )
        if model.bidirectional:
            raise UserError(
                "model.bidirectional is true, so next-token prediction would see its answer; use "
                "the task MaskedLanguageModeling."
            )

    def training_loss(
        self, model: DecoderLM, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """See `Task`; `router` is the report of the first pass."""
        tokens = batch["tokens"]
        weights = model.config.moe.router.loss_weights

        def one_pass(key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, list[MoEReport]]:
            logits, reports, _ = model(tokens[:, :-1], None, Mode.TRAIN, key)
            loss = token_losses(logits, tokens[:, 1:]).mean()
            return loss, auxiliary_loss(reports, weights, self.auxiliary_reduction), logits, reports

        loss, auxiliary, logits, reports = one_pass(key)
        metrics: Metrics = {"loss": loss, "auxiliary_loss": auxiliary, "router": reports}
        total = loss + auxiliary
        if self.consistency_weight:
            other_loss, other_auxiliary, other_logits, _ = one_pass(jax.random.fold_in(key, 2))
            consistency = symmetric_divergence(logits, other_logits).mean()
            metrics["consistency_loss"] = consistency
            total += other_loss + other_auxiliary + self.consistency_weight * consistency
        return total, metrics

    def evaluation_tokens(self, batch: Batch) -> jax.Array:
        """All but the last token of each row."""
        return batch["tokens"][:, :-1]

    def evaluation_sums(
        self, model: DecoderLM, batch: Batch, num_domains: int
    ) -> tuple[jax.Array, jax.Array]:
        """See `Task`."""
        tokens, targets = self.evaluation_tokens(batch), batch["tokens"][:, 1:]
        mask = jnp.broadcast_to(batch["mask"][:, None], targets.shape)
        logits, _, _ = model(tokens, mask, Mode.EVALUATE)
        return sums_by_domain(token_losses(logits, targets), mask, batch["domain"], num_domains)


def token_losses(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """-log p(target) in nats: logits [B, L, V] float32, targets [B, L] int32, result [B, L]."""
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, targets)


def symmetric_divergence(logits: jax.Array, other: jax.Array) -> jax.Array:
    """(KL(p || q) + KL(q || p)) / 2 in nats of the softmaxes of two [B, L, V]; result [B, L]."""
    log_p, log_q = jax.nn.log_softmax(logits), jax.nn.log_softmax(other)
    return 0.5 * ((jnp.exp(log_p) - jnp.exp(log_q)) * (log_p - log_q)).sum(axis=-1)


def sums_by_domain(
    losses: jax.Array, mask: jax.Array, domain: jax.Array, num_domains: int
) -> tuple[jax.Array, jax.Array]:
    """Sums [B, L] losses where mask [B, L] is True into ([D] losses, [D] counts) by domain [B]."""
    counts = mask.sum(axis=1).astype(jnp.float32)
    return (
        jax.ops.segment_sum((losses * mask).sum(axis=1), domain, num_domains),
        jax.ops.segment_sum(counts, domain, num_domains),
    )
