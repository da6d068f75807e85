"""Losses and accuracy by hand, with a model whose logits are written down."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.data.images import ImageData
from moe_jax.data.pipelines import TextData
from moe_jax.errors import UserError
from moe_jax.layers.mode import Mode
from moe_jax.layers.moe import MoEReport
from moe_jax.models.abstract_model import AbstractModel
from moe_jax.models.vision import Pooling, VisionConfig
from moe_jax.tasks.image_classification import ClassLoss, ImageClassification, pixels

# Two classes; p of the first is 3/4, 1/4, 3/4.
LOGITS = jnp.array([[math.log(3), 0.0], [0.0, math.log(3)], [math.log(3), 0.0]])
BATCH = {
    "image": jnp.zeros((3, 2, 2, 1), jnp.uint8),
    "label": jnp.array([0, 0, 1]),
    "domain": jnp.array([1, 0, 1]),
    "mask": jnp.array([True, True, False]),
}
MODEL = VisionConfig(image_size=28, patch_size=14, channels=1, num_classes=10)


class Oracle:
    """Answers LOGITS and an auxiliary loss of 0.5 in each of two layers; remembers its calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, images, mask, mode, key=None):
        self.calls.append((images, mask, mode))
        return LOGITS, [MoEReport({}, {}, auxiliary_loss=jnp.array([0.5, 0.5]))]


def test_training_loss():
    oracle = Oracle()
    total, metrics = ImageClassification().training_loss(oracle, BATCH, jax.random.key(0))
    cross_entropy = (math.log(4 / 3) + 2 * math.log(4)) / 3
    assert metrics["loss"] == pytest.approx(cross_entropy)
    assert total == pytest.approx(cross_entropy + 1.0)
    assert metrics["auxiliary_loss"] == 1.0
    assert metrics["accuracy"] == pytest.approx(1 / 3)
    images, mask, mode = oracle.calls[0]
    assert mask is None and mode == Mode.TRAIN
    np.testing.assert_array_equal(images, np.full((3, 2, 2, 1), -1.0))


def test_smoothing_and_sigmoid():
    """Smoothing 0.2 of two classes makes targets of 0.9 and 0.1."""
    p, q = math.log(3 / 4), math.log(1 / 4)
    labels = BATCH["label"]
    smooth = ImageClassification().class_losses(LOGITS, labels, 0.2)
    np.testing.assert_allclose(smooth[:2], [-0.9 * p - 0.1 * q, -0.9 * q - 0.1 * p], rtol=1e-5)
    sigmoid = ImageClassification(loss=ClassLoss.SIGMOID).class_losses(LOGITS, labels, 0.0)
    # Of the first image: -log sigmoid(log 3) - log(1 - sigmoid(0)).
    np.testing.assert_allclose(sigmoid[0], -p - math.log(0.5), rtol=1e-5)
    np.testing.assert_allclose(sigmoid[1], -math.log(0.5) - q, rtol=1e-5)


def test_evaluation_leaves_out_fillers_and_smoothing():
    task = ImageClassification(label_smoothing=0.3)
    sums = task.evaluation_sums(Oracle(), BATCH, 3)
    losses, counts = sums["loss"]
    np.testing.assert_allclose(losses, [math.log(4), math.log(4 / 3), 0.0], rtol=1e-5)
    np.testing.assert_array_equal(counts, [1, 1, 0])
    np.testing.assert_array_equal(sums["accuracy"][0], [0, 1, 0])
    np.testing.assert_array_equal(sums["accuracy"][1], counts)


def test_routing_is_observed_by_patch():
    """Two images of 4 patches and a class token are one group of 10."""
    moe = dataclasses.replace(MODEL.moe, group_size=10)
    abstract_model = AbstractModel.of(dataclasses.replace(MODEL, num_layers=2, moe=moe))

    def observe(parameters, batch):
        return ImageClassification().observe(abstract_model.merge(parameters), batch)

    image = jax.ShapeDtypeStruct((2, 28, 28, 1), jnp.uint8)
    row, mask = (jax.ShapeDtypeStruct((2,), dtype) for dtype in (jnp.int32, jnp.bool_))
    batch = {"image": image, "label": row, "domain": row, "mask": mask}
    layers = jax.eval_shape(observe, abstract_model.shapes, batch)
    assert list(layers) == [1]
    observed = layers[1]
    assert observed.tokens.positions.shape == observed.tokens.labels.shape == (1, 10)
    assert observed.routing.assignment.experts.shape == (1, 10, 2)
    assert (observed.length, observed.vocab_size) == (5, 0)


def test_pixels():
    values = pixels(jnp.array([0, 51, 255], jnp.uint8))
    np.testing.assert_allclose(values, [-1, -0.6, 1], atol=1e-6)
    floats = jnp.array([0.0, 7.0])
    assert pixels(floats) is floats


@pytest.mark.parametrize(
    ("task", "model", "data", "words"),
    [
        (ImageClassification(label_smoothing=1.0), MODEL, ImageData(), "label_smoothing is 1.0"),
        (
            ImageClassification(),
            MODEL,
            ImageData(image_size=32),
            "model.image_size is 28, but data.image_size is 32; make them equal",
        ),
        (
            ImageClassification(),
            dataclasses.replace(MODEL, num_classes=3),
            ImageData(),
            "model.num_classes is 3, but data.num_classes is 10",
        ),
        (ImageClassification(), MODEL, TextData(), "data is TextData; use ImageData"),
    ],
)
def test_what_does_not_fit_is_refused(task, model, data, words):
    with pytest.raises(UserError, match=words):
        task.validate(model, data)


def test_groups_are_cut_from_patches_and_class_token():
    task = ImageClassification()
    task.validate(MODEL, ImageData())
    field = "model.moe.group_size"
    assert task.moe_inputs(MODEL, ImageData()) == [(field, 5, MODEL.moe.group_size)]
    gap = dataclasses.replace(MODEL, pooling=Pooling.GAP)
    assert task.moe_inputs(gap, ImageData()) == [(field, 4, MODEL.moe.group_size)]
    assert task.moe_inputs(dataclasses.replace(MODEL, moe_every=0), ImageData()) == []
