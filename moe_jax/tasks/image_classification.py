"""Classification of images.

Axis letters: B images, V classes, D domains.
"""

import dataclasses
import enum

import jax
import jax.numpy as jnp
import optax

from moe_jax.component import field
from moe_jax.data.images import ImageData
from moe_jax.errors import UserError
from moe_jax.layers.mode import Mode
from moe_jax.models.vision import Vision, VisionConfig
from moe_jax.tasks.auxiliary import LayerReduction, auxiliary_loss
from moe_jax.tasks.task import (
    Batch,
    Metrics,
    ObservedLayer,
    Sums,
    Task,
    observed_layers,
)


class ClassLoss(enum.StrEnum):
    """SOFTMAX: cross-entropy of one distribution over the classes.

    SIGMOID: summed cross-entropies of one yes-or-no question for each class, as V-MoE and Soft MoE
    are trained, where an image may have several labels (Beyer et al. 2020, section 4.2).
    """

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"


@dataclasses.dataclass
class ImageClassification(Task):
    """Mean loss in nats per image, plus the routers' losses times their coefficients.

    Attributes:
      loss: over the classes.
      label_smoothing: share of the target that is spread evenly over all classes, in training
        (Szegedy et al. 2016, section 7).
      auxiliary_reduction: over MoE layers.
    """

    loss: ClassLoss = ClassLoss.SOFTMAX
    label_smoothing: float = field(0.0, at_least=0, below=1)
    auxiliary_reduction: LayerReduction = LayerReduction.SUM

    def validate(self, model: VisionConfig, data: ImageData) -> None:
        """Raises UserError for fields out of range, or a model of other images than the data's."""
        self.check_ranges("task")
        for kind, config, name in (
            ("model", model, VisionConfig),
            ("data", data, ImageData),
        ):
            if not isinstance(config, name):
                raise UserError(
                    f"task is ImageClassification, but {kind} is {type(config).__name__}; use "
                    f"{name.__name__}."
                )
        for size in ("image_size", "channels", "num_classes"):
            if getattr(model, size) != getattr(data, size):
                raise UserError(
                    f"model.{size} is {getattr(model, size)}, but data.{size} is "
                    f"{getattr(data, size)}; make them equal."
                )

    def moe_inputs(self, model: VisionConfig, data: ImageData) -> list[tuple[str, int, int]]:
        """See `Task`: patches, and the class token if there is one."""
        if not model.moe_layers:
            return []
        moe = model.moe.for_rows(model.num_tokens)
        return [("model.moe.group_size", model.num_tokens, moe.group_size)]

    def training_loss(
        self, model: Vision, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """See `Task`."""
        logits, reports = model(pixels(batch["image"]), None, Mode.TRAIN, key)
        labels = batch["label"]
        loss = self.class_losses(logits, labels, self.label_smoothing).mean()
        auxiliary = auxiliary_loss(reports, self.auxiliary_reduction)
        metrics = {
            "loss": loss,
            "auxiliary_loss": auxiliary,
            "accuracy": is_right(logits, labels).mean(),
            "router": reports,
        }
        return loss + auxiliary, metrics

    def num_targets(self, batch: Batch, key: jax.Array) -> jax.Array:
        """See `Task`: images."""
        return jnp.asarray(len(batch["label"]), jnp.float32)

    def evaluation_sums(self, model: Vision, batch: Batch, num_domains: int) -> Sums:
        """See `Task`: loss without smoothing, and accuracy."""
        mask, labels = batch["mask"], batch["label"]
        logits, _ = model(pixels(batch["image"]), mask, Mode.EVALUATE)

        def by_domain(values: jax.Array) -> jax.Array:
            return jax.ops.segment_sum(values * mask, batch["domain"], num_domains)

        counts = by_domain(jnp.ones(labels.shape))
        return {
            "loss": (by_domain(self.class_losses(logits, labels, 0.0)), counts),
            "accuracy": (by_domain(is_right(logits, labels)), counts),
        }

    def observe(self, model: Vision, batch: Batch) -> dict[int | str, ObservedLayer]:
        """See `Task`."""
        config: VisionConfig = model.config
        mask = batch["mask"]
        _, reports = model(pixels(batch["image"]), mask, Mode.OBSERVE)
        info = model.token_info(len(mask), mask)
        return observed_layers(
            config.moe_layers, reports, info, batch["domain"], config.moe_settings, vocab_size=0
        )

    def class_losses(self, logits: jax.Array, labels: jax.Array, smoothing: float) -> jax.Array:
        """[B] loss in nats of each image; logits [B, V] float32, labels [B] int32."""
        targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
        if self.loss == ClassLoss.SIGMOID:
            return optax.sigmoid_binary_cross_entropy(logits, targets).sum(axis=-1)
        return optax.softmax_cross_entropy(logits, targets)


def pixels(images: jax.Array) -> jax.Array:
    """float32 in [-1, 1] of uint8; float32 images are taken as they are."""
    if images.dtype == jnp.uint8:
        return images.astype(jnp.float32) / 127.5 - 1.0
    return images


def is_right(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """[B] float32, 1 where the largest of [B, V] logits is the label's."""
    return (logits.argmax(axis=-1) == labels).astype(jnp.float32)
