"""Next-token prediction.

Axis letters: B batch, L length, V vocabulary, D domains.
"""

import abc
import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax

from moe_jax.component import field
from moe_jax.data.pipelines import TextData
from moe_jax.errors import UserError
from moe_jax.layers.mode import Mode
from moe_jax.layers.moe import MoEConfig, MoEReport, TokenInfo
from moe_jax.models.decoder_lm import DecoderLMConfig
from moe_jax.tasks.auxiliary import LayerReduction, auxiliary_loss
from moe_jax.tasks.task import Batch, Metrics, ObservedLayer, Sums, Task, observed_layers


@runtime_checkable
class TextModelConfig(Protocol):
    """Config of a model that is called as LanguageModel is: tokens [B, L] to logits [B, L, V].

    Attributes:
      vocab_size: V.
      max_length: longest sequence.
      moe: how tokens are routed.
    """

    vocab_size: int
    max_length: int
    moe: MoEConfig

    @property
    def moe_layers(self) -> list[Any]:
        """See `moe_jax.models.interface.ModelConfig`."""

    @property
    def moe_settings(self) -> list[MoEConfig]:
        """The settings that some MoE has, each once."""

    @property
    def experts_of_layers(self) -> list[int]:
        """Number of experts of each MoE layer."""


@dataclasses.dataclass
class TextTask(Task):
    """What tasks on rows of text have in common.

    Attributes:
      auxiliary_reduction: over MoE layers.
    """

    auxiliary_reduction: LayerReduction = LayerReduction.SUM

    def validate(self, model: Any, data: Any) -> None:
        """Raises UserError for a model or data of another kind, or text that does not fit in."""
        name = type(self).__name__
        if not isinstance(data, TextData):
            raise UserError(
                f"data is {type(data).__name__}, but the task {name} reads rows of text; use "
                "TextData."
            )
        if not isinstance(model, TextModelConfig):
            raise UserError(
                f"model is {type(model).__name__}, but the task {name} trains one of text; use "
                "DecoderLMConfig."
            )
        if data.sequence_length > model.max_length:
            raise UserError(
                f"data.sequence_length is {data.sequence_length}, longer than the "
                f"model.max_length={model.max_length} positions; raise max_length."
            )
        if model.vocab_size < data.tokenizer.vocab_size:
            raise UserError(
                f"model.vocab_size is {model.vocab_size}, smaller than the tokenizer's "
                f"{data.tokenizer.vocab_size} ids; raise it."
            )

    def moe_inputs(self, model: TextModelConfig, data: TextData) -> list[tuple[str, int, int]]:
        """See `Task`."""
        if not model.moe_layers:
            return []
        moe = model.moe.for_rows(data.sequence_length)
        return [("model.moe.group_size", data.sequence_length, moe.group_size)]

    @abc.abstractmethod
    def evaluation_tokens(self, batch: Batch) -> jax.Array:
        """[B, L] int32, what the model reads in evaluation."""

    def observe(self, model: Any, batch: Batch) -> dict[int | str, ObservedLayer]:
        """See `Task`."""
        config: TextModelConfig = model.config
        tokens = self.evaluation_tokens(batch)
        info = TokenInfo.of(tokens, batch["mask"])
        _, reports, _ = model(tokens, info.mask, Mode.OBSERVE)
        settings, domain = config.moe_settings, batch["domain"]
        return observed_layers(
            config.moe_layers, reports, info, domain, settings, config.vocab_size
        )


@dataclasses.dataclass
class LanguageModeling(TextTask):
    """Mean cross-entropy in nats per token, plus the routers' losses times their coefficients.

    Attributes:
      consistency_weight: alpha of THOR's consistency loss (Zuo et al. 2021 eq. 4; 5.0 in its
        translation script); 0 trains as usual. Above 0 the model runs twice with other random
        experts, and the loss is the sum of both cross-entropies and alpha times the mean of the two
        Kullback-Leibler divergences between the predictions. Twice the cost.
    """

    consistency_weight: float = field(0.0, at_least=0)

    def validate(self, model: TextModelConfig, data: TextData) -> None:
        """Raises UserError for a negative coefficient or a model that sees the next token."""
        super().validate(model, data)
        self.check_ranges("task")
        experts = max(model.experts_of_layers, default=0)
        stateful = [moe.router for moe in model.moe_settings if moe.router.init_state(experts)]
        if self.consistency_weight and stateful:
            raise UserError(
                f"task.consistency_weight is {self.consistency_weight}, which runs the model twice a "
                f"step, and {type(stateful[0]).__name__} moves its expert bias in every run; "
                "use another router or consistency_weight=0."
            )
        if isinstance(model, DecoderLMConfig) and model.bidirectional:
            raise UserError(
                "model.bidirectional is true, so next-token prediction would see its answer; use "
                "the task MaskedLanguageModeling."
            )

    def training_loss(self, model: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        """See `Task`; `router` is the report of the first pass."""
        tokens = batch["tokens"]

        def one_pass(key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, list[MoEReport]]:
            logits, reports, _ = model(tokens[:, :-1], None, Mode.TRAIN, key)
            loss = token_losses(logits, tokens[:, 1:]).mean()
            return loss, auxiliary_loss(reports, self.auxiliary_reduction), logits, reports

        loss, auxiliary, logits, reports = one_pass(key)
        metrics: Metrics = {"loss": loss, "auxiliary_loss": auxiliary, "router": reports}
        total = loss + auxiliary
        if self.consistency_weight:
            other_loss, other_auxiliary, other_logits, _ = one_pass(jax.random.fold_in(key, 2))
            consistency = symmetric_divergence(logits, other_logits).mean()
            metrics["consistency_loss"] = consistency
            total += other_loss + other_auxiliary + self.consistency_weight * consistency
        return total, metrics

    def num_targets(self, batch: Batch, key: jax.Array) -> jax.Array:
        """See `Task`: every token but the first of each row."""
        return jnp.asarray(batch["tokens"][:, 1:].size, jnp.float32)

    def evaluation_tokens(self, batch: Batch) -> jax.Array:
        """All but the last token of each row."""
        return batch["tokens"][:, :-1]

    def evaluation_sums(self, model: Any, batch: Batch, num_domains: int) -> Sums:
        """See `Task`: loss and accuracy per token."""
        tokens, targets = self.evaluation_tokens(batch), batch["tokens"][:, 1:]
        mask = jnp.broadcast_to(batch["mask"][:, None], targets.shape)
        logits, _, _ = model(tokens, mask, Mode.EVALUATE)
        return prediction_sums(logits, targets, mask, batch["domain"], num_domains)


def token_losses(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """-log p(target) in nats: logits [B, L, V] float32, targets [B, L] int32, result [B, L]."""
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, targets)


def symmetric_divergence(logits: jax.Array, other: jax.Array) -> jax.Array:
    """(KL(p || q) + KL(q || p)) / 2 in nats of the softmaxes of two [B, L, V]; result [B, L]."""
    log_p, log_q = jax.nn.log_softmax(logits), jax.nn.log_softmax(other)
    return 0.5 * ((jnp.exp(log_p) - jnp.exp(log_q)) * (log_p - log_q)).sum(axis=-1)


def prediction_sums(
    logits: jax.Array, targets: jax.Array, mask: jax.Array, domain: jax.Array, num_domains: int
) -> Sums:
    """Loss in nats and accuracy of predicted tokens, for `Task.evaluation_sums`.

    Args:
      logits: [B, L, V] float32.
      targets: [B, L] int32.
      mask: [B, L] bool, False where nothing is predicted.
      domain: [B] int32.
      num_domains: D.
    """
    right = logits.argmax(axis=-1) == targets
    return {
        "loss": sums_by_domain(token_losses(logits, targets), mask, domain, num_domains),
        "accuracy": sums_by_domain(right, mask, domain, num_domains),
    }


def sums_by_domain(
    values: jax.Array, mask: jax.Array, domain: jax.Array, num_domains: int
) -> tuple[jax.Array, jax.Array]:
    """Sums [B, L] values where mask [B, L] is True into ([D] sums, [D] counts) by domain [B]."""
    counts = mask.sum(axis=1).astype(jnp.float32)
    return (
        jax.ops.segment_sum((values * mask).sum(axis=1, dtype=jnp.float32), domain, num_domains),
        jax.ops.segment_sum(counts, domain, num_domains),
    )
