"""Prediction of a text from another: span corruption, translation.

Axis letters: B batch, M input length, N target length, V vocabulary, D domains.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.component import field
from moe_jax.data.interface import DataConfig
from moe_jax.data.pairs import PairData
from moe_jax.data.span_corruption import SpanCorruptionData
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.errors import UserError
from moe_jax.layers.mode import Mode
from moe_jax.layers.moe import MoEConfig, MoEReport, TokenInfo
from moe_jax.models.encoder_decoder import EncoderDecoderConfig
from moe_jax.models.interface import ModelConfig
from moe_jax.models.recurrent_translator import RecurrentTranslatorConfig
from moe_jax.tasks.auxiliary import LayerReduction, auxiliary_loss
from moe_jax.tasks.language_modeling import prediction_sums, symmetric_divergence, token_losses
from moe_jax.tasks.task import Batch, Metrics, ObservedLayer, Sums, Task, observed_layers

TextToTextModel = EncoderDecoderConfig | RecurrentTranslatorConfig
TextToTextData = PairData | SpanCorruptionData


@dataclasses.dataclass
class TextToText(Task):
    """Mean cross-entropy in nats per target token, plus the routers' losses times their coefficients.

    PAD is neither predicted nor routed. In training only, `label_smoothing` and `z_loss` add to the
    loss; the metric `loss` and evaluation are the cross-entropy alone.

    Attributes:
      label_smoothing: share of the target that is spread evenly over the vocabulary (Szegedy et al.
        2016, section 7; 0.1 in THOR's and GShard's translation).
      z_loss: coefficient of the mean of log(Z)^2, Z the softmax' normalizer, which keeps logits from
        drifting (1e-4 in T5's code).
      auxiliary_reduction: over MoE layers.
      consistency_weight: alpha of THOR's consistency loss, see `LanguageModeling`; 5.0 in its
        translation script. Twice the cost where it is not 0.
    """

    label_smoothing: float = field(0.0, at_least=0, below=1)
    z_loss: float = field(0.0, at_least=0)
    auxiliary_reduction: LayerReduction = LayerReduction.SUM
    consistency_weight: float = field(0.0, at_least=0)

    def validate(self, model: ModelConfig, data: DataConfig) -> None:
        """Raises UserError for fields out of range, or a model or data of another kind."""
        self.check_ranges("task")
        if not isinstance(data, TextToTextData):
            raise UserError(
                f"data is {type(data).__name__}, but the task TextToText reads inputs and targets; "
                "use PairData or SpanCorruptionData."
            )
        if not isinstance(model, TextToTextModel):
            raise UserError(
                f"model is {type(model).__name__}, but the task TextToText trains an encoder and a "
                "decoder; use EncoderDecoderConfig or RecurrentTranslatorConfig."
            )
        sizes = {"vocab_size": model.vocab_size, "target_vocab_size": model.output_vocab_size}
        for name, size in sizes.items():
            if size < data.tokenizer.vocab_size:
                raise UserError(
                    f"model.{name} is {size}, smaller than the tokenizer's "
                    f"{data.tokenizer.vocab_size} ids; raise it."
                )
        if self.consistency_weight:
            self._check_stateless(model)

    def _check_stateless(self, model: TextToTextModel) -> None:
        for stack in ("encoder", "decoder"):
            path, settings = _moe_of(model, stack)
            stateful = [moe.router for moe in settings if moe.router.init_state(1)]
            if stateful:
                raise UserError(
                    f"task.consistency_weight is {self.consistency_weight}, which runs the model "
                    f"twice a step, and {path}.router {type(stateful[0]).__name__} moves its expert "
                    "bias in every run; use another router or consistency_weight=0."
                )

    def moe_inputs(
        self, model: TextToTextModel, data: TextToTextData
    ) -> list[tuple[str, int, int]]:
        """See `Task`: inputs in the encoder, targets in the decoder."""
        lengths = {"encoder": data.input_length, "decoder": data.target_length}
        groups = []
        for stack, length in lengths.items():
            path, settings = _moe_of(model, stack)
            if settings:
                size = settings[0].for_rows(length).group_size
                groups.append((f"{path}.group_size", length, size))
        return groups

    def training_loss(self, model: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        """See `Task`; `router` is the report of the first pass."""
        targets, mask = batch["targets"][:, 1:], _target_mask(batch)

        def one_pass(key: jax.Array) -> tuple[jax.Array, jax.Array, list[MoEReport]]:
            logits, reports = _predict(model, batch, Mode.TRAIN, key)
            loss = masked_mean(self._objective(logits, targets), mask)
            return loss + auxiliary_loss(reports, self.auxiliary_reduction), logits, reports

        total, logits, reports = one_pass(key)
        metrics: Metrics = {
            "loss": masked_mean(token_losses(logits, targets), mask),
            "accuracy": masked_mean(logits.argmax(axis=-1) == targets, mask),
            "auxiliary_loss": auxiliary_loss(reports, self.auxiliary_reduction),
            "router": reports,
        }
        if self.consistency_weight:
            other_total, other_logits, _ = one_pass(jax.random.fold_in(key, 2))
            consistency = masked_mean(symmetric_divergence(logits, other_logits), mask)
            metrics["consistency_loss"] = consistency
            total += other_total + self.consistency_weight * consistency
        return total, metrics

    def num_targets(self, batch: Batch, key: jax.Array) -> jax.Array:
        """See `Task`: target tokens without padding, EOS included."""
        return _target_mask(batch).sum(dtype=jnp.float32)

    def _objective(self, logits: jax.Array, targets: jax.Array) -> jax.Array:
        """What is minimised for every target: logits [B, N, V], targets [B, N], result [B, N]."""
        log_z = jax.nn.logsumexp(logits, axis=-1)
        of_target = token_losses(logits, targets)
        of_all = log_z - logits.mean(axis=-1)
        smoothed = (1 - self.label_smoothing) * of_target + self.label_smoothing * of_all
        return smoothed + self.z_loss * log_z**2

    def evaluation_sums(self, model: Any, batch: Batch, num_domains: int) -> Sums:
        """See `Task`: loss and accuracy per target token, EOS included."""
        logits, _ = _predict(model, batch, Mode.EVALUATE, None)
        targets, mask = batch["targets"][:, 1:], _target_mask(batch)
        return prediction_sums(logits, targets, mask, batch["domain"], num_domains)

    def observe(self, model: Any, batch: Batch) -> dict[int | str, ObservedLayer]:
        """See `Task`."""
        config: TextToTextModel = model.config
        _, reports = _predict(model, batch, Mode.OBSERVE, None)
        read = {
            "encoder": (batch["inputs"], _input_mask(batch), config.vocab_size),
            "decoder": (batch["targets"][:, :-1], _target_mask(batch), config.output_vocab_size),
        }
        observed: dict[int | str, ObservedLayer] = {}
        for stack, (tokens, mask, vocab_size) in read.items():
            names = _layers_of(config, stack)
            info = dataclasses.replace(TokenInfo.of(tokens), mask=mask)
            own, reports = _first_layers(reports, len(names))
            _, settings = _moe_of(config, stack)
            observed |= observed_layers(names, own, info, batch["domain"], settings, vocab_size)
        return observed


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """The mean of [B, N] values where mask [B, N] is True, [] float32; 0 where it never is."""
    total = jnp.sum(values * mask, dtype=jnp.float32)
    return total / jnp.maximum(mask.sum(), 1)


def _input_mask(batch: Batch) -> jax.Array:
    return batch["inputs"] != Tokenizer.PAD


def _target_mask(batch: Batch) -> jax.Array:
    """[B, N] bool, False where there is nothing to predict."""
    return batch["targets"][:, 1:] != Tokenizer.PAD


def _predict(
    model: Any, batch: Batch, mode: Mode, key: jax.Array | None
) -> tuple[jax.Array, list[MoEReport]]:
    """Logits [B, N, V] of every target after the first, which is BOS, and reports."""
    targets_in, target_mask = batch["targets"][:, :-1], _target_mask(batch)
    return model(batch["inputs"], _input_mask(batch), targets_in, target_mask, mode, key)


def _layers_of(model: TextToTextModel, stack: str) -> list[str]:
    """The names of the MoE layers of `encoder` or `decoder`."""
    return [name for name in model.moe_layers if name.startswith(f"{stack}/")]


def _moe_of(model: TextToTextModel, stack: str) -> tuple[str, list[MoEConfig]]:
    """The config field of what routes in a stack, and the settings of its layers."""
    if isinstance(model, RecurrentTranslatorConfig):
        return "model.moe", model.moe_settings
    config = model.encoder if stack == "encoder" else model.decoder
    return f"model.{stack}.moe", config.moe_settings


def _first_layers(
    reports: list[MoEReport], num_layers: int
) -> tuple[list[MoEReport], list[MoEReport]]:
    """Cuts reports, each of one or more layers, after those of the first `num_layers`."""
    cut = 0
    while num_layers > 0:
        num_layers -= len(reports[cut].statistics["load"])
        cut += 1
    return reports[:cut], reports[cut:]
