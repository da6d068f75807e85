"""Ridge regression against its abstract_model, and few-shot accuracy of a tiny model."""

import dataclasses
import functools
import pickle

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds

from moe_jax.data.images import ImageData
from moe_jax.errors import UserError
from moe_jax.layers.mode import Mode
from moe_jax.models.vision import VisionConfig
from moe_jax.reproduction.few_shot import NewClasses, features, few_shot, ridge_accuracies
from moe_jax.tasks.image_classification import ImageClassification, pixels
from moe_jax.training.experiment import Experiment
from moe_jax.training.optimizers import AdamW
from moe_jax.training.run import Run
from moe_jax.training.trained import Trained
from tests.tiny import tiny_config

# More features than images, and fewer.
SIZES = [(6, 9), (40, 9)]


@pytest.mark.parametrize(("count", "width"), SIZES)
def test_ridge_regression_is_its_dual(count, width):
    """The authors' code solves this form where there are more features than images."""
    rng = np.random.default_rng(0)
    support, queries = rng.normal(3, 2, (count, width)), rng.normal(3, 2, (500, width))
    labels, answers = np.arange(count) % 3, rng.integers(0, 3, 500)

    def whitened(x):
        x = (x - support.mean(axis=0)) / (support.std(axis=0) + 1e-5)
        return np.hstack([x, np.full((len(x), 1), 100.0)])

    x, y = whitened(support), 2.0 * np.eye(3)[labels] - 1
    penalties = (2.0**-4, 1.0, 2.0**8)
    expected = []
    for penalty in penalties:
        weights = x.T @ np.linalg.solve(x @ x.T + penalty * np.eye(count), y)
        expected.append(((whitened(queries) @ weights).argmax(axis=1) == answers).mean())
    found = ridge_accuracies(support, labels, queries, answers, penalties)
    np.testing.assert_allclose(found, expected, atol=1 / 500 + 1e-9)
    assert len(set(expected)) > 1


def test_classes_apart_are_told_apart_and_unknown_ones_are_wrong():
    rng = np.random.default_rng(0)
    labels, answers = np.repeat([4, 7], 5), np.repeat([4, 7, 9], 10)
    centers = rng.normal(size=(10, 8)) * 20
    noise = rng.normal(size=(30, 8))
    found = ridge_accuracies(
        centers[labels] + noise[:10], labels, centers[answers] + noise, answers, (1.0,)
    )
    np.testing.assert_allclose(found, [2 / 3])


class Patterns(tfds.core.GeneratorBasedBuilder):
    """Noise over a pattern of each class, on all patches; classes 2 and 3 are new."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None

    def _info(self):
        features = {
            "image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8, encoding="zlib"),
            "label": tfds.features.ClassLabel(num_classes=4),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        labels = {"train": (0, 1), "validation": (0, 1), "few_shot": (2, 3)}
        return {split: self._generate_examples(of) for split, of in labels.items()}

    def _generate_examples(self, labels):
        patterns = np.random.default_rng(0).integers(0, 200, (4, 4, 4, 1))
        rng = np.random.default_rng(labels)
        for n in range(20):
            label = labels[n % 2]
            pixels = np.tile(patterns[label], (2, 2, 1)) + rng.integers(0, 50, (8, 8, 1))
            yield n, {"image": pixels.astype(np.uint8), "label": label}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    builder = Patterns(data_dir=tmp_path_factory.mktemp("images"), file_format="array_record")
    builder.download_and_prepare()
    model = VisionConfig(
        num_layers=1, width=16, num_heads=1, head_width=16, mlp_width=16, moe_every=0, image_size=8,
        patch_size=4, channels=1, num_classes=4, pre_logits=True,
    )  # fmt: skip
    config = Experiment(
        model=model,
        task=ImageClassification(),
        data=ImageData(dataset=str(builder.data_path), image_size=8, num_classes=4, batch_size=8),
        optimizer=AdamW(),
    )
    run = Run.build(config)
    state = run.initial_state()
    # The head starts at 0, with which all images are of the first class.
    head = {
        name: x + 0.1 * np.arange(x.size).reshape(x.shape) % 0.7
        for name, x in state.parameters["head"].items()
    }
    return Trained(
        tmp_path_factory.mktemp("run"), run, 0, {**state.parameters, "head": head}, state.variables
    )


def new_classes(trained, **fields) -> NewClasses:
    dataset = trained.run.config.data.dataset
    return NewClasses(**{"dataset": dataset, "num_classes": 4, "support": "few_shot[:60%]",
                         "queries": "few_shot[60%:]", **fields})  # fmt: skip


def test_features_are_what_the_head_classifies(trained):
    pipeline = trained.open_data()
    vectors, labels = features(trained, pipeline, "few_shot")
    assert vectors.shape == (20, 16) and np.bincount(labels).tolist() == [0, 0, 10, 10]
    batch = pipeline.held_out_batches("few_shot", 3)[0]
    abstract_model, parameters = trained.run.abstract_model, trained.parameters
    with jax.set_mesh(trained.run.mesh):
        model = jax.jit(lambda p, x: abstract_model.merge(p, {})(pixels(x), None, Mode.EVALUATE)[0])
        logits = model(parameters, batch["image"])
    head = parameters["head"]
    np.testing.assert_allclose(vectors[:8] @ head["kernel"] + head["bias"], logits, atol=1e-5)
    np.testing.assert_array_equal(labels[:8], batch["label"])


def test_new_classes_are_told_apart_from_few_images(trained):
    measure = functools.partial(few_shot, classes=new_classes(trained), shots=(1, 4), draws=3)
    found = pickle.loads(pickle.dumps(measure))(trained)
    assert list(found) == ["1", "4"]
    assert 0.5 < found["4"] <= 1.0
    assert found == measure(trained)


def test_too_few_images_are_refused(trained):
    with pytest.raises(UserError, match=r"10 images of each class .* has [4-8]; take fewer"):
        few_shot(trained, new_classes(trained))


def test_a_run_on_text_is_refused(trained):
    config = dataclasses.replace(trained.run.config, data=tiny_config("").data)
    other = dataclasses.replace(trained, run=dataclasses.replace(trained.run, config=config))
    with pytest.raises(UserError, match="a run on TextData, not on images"):
        few_shot(other)
