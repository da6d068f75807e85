"""Claim 7, V-MoE: what it says of planted effects, and its measurements of a trained run."""

import pickle

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from matplotlib.figure import Figure

from experiments.claims import batch_priority
from moe_jax.data.images import ImageData
from moe_jax.layers.moe import MoEConfig
from moe_jax.models.vision import VisionConfig
from moe_jax.reproduction.claim import Profile
from moe_jax.reproduction.results import FinishedRun
from moe_jax.reproduction.verdicts import Verdict, overall
from moe_jax.routing.capacity import Capacity, CapacityRule
from moe_jax.routing.priority import Priority
from moe_jax.routing.token_choice import VMoE
from moe_jax.tasks.image_classification import ImageClassification
from moe_jax.training.experiment import Evaluation, Experiment
from moe_jax.training.optimizers import AdamW
from moe_jax.training.run import Run
from moe_jax.training.trained import Trained
from tests.reproduction.synthetic import synthetic_results

LOST = {
    Priority.CHOICE: 1.0,
    Priority.BATCH_PRIORITY: 0.2,
    Priority.ASSIGNMENT_PRIORITY: 0.3,
}


def planted(effect, noise=0.001):
    """The vanilla order loses `effect` without buffers, and batch priority a fifth of that."""
    rng = np.random.default_rng(0)
    factors = np.array(batch_priority.CAPACITIES)

    def run(side, seed):
        measured = {"test": {"eval/loss": 1.0, "eval/accuracy": 0.8 + rng.normal() * noise}}
        if side.name == "V-MoE":
            measured[batch_priority.BY_CAPACITY.name] = {
                order: list(
                    0.85 - effect * lost * (1 - factors) + noise * rng.normal(size=len(factors))
                )
                for order, lost in LOST.items()
            }
            drawn = (batch_priority.DRAWN_IMAGES, 28, 28)
            measured[batch_priority.DROPPED.name] = {
                "images": rng.integers(0, 256, drawn).tolist(),
                "dropped": [
                    (rng.random((batch_priority.DRAWN_IMAGES, 7, 7)) > factor).tolist()
                    for factor in batch_priority.DRAWN_CAPACITIES
                ],
            }
        return FinishedRun(seed, 1e-3, [], measured, None, 1.0)

    return synthetic_results(batch_priority.CLAIM, run)


@pytest.mark.parametrize(
    ("effect", "verdict"), [(0.2, Verdict.REPRODUCED), (-0.2, Verdict.CONTRADICTED)]
)
def test_a_planted_effect_is_found(effect, verdict):
    found = batch_priority.findings(planted(effect))
    assert {finding.verdict for finding in found} == {verdict}
    assert overall(found) == verdict


def test_noise_is_no_effect():
    assert overall(batch_priority.findings(planted(0.0))) != Verdict.REPRODUCED


@pytest.mark.parametrize("profile", Profile)
def test_configs_are_valid(profile):
    sparse, dense = (side.config(1e-3, 0) for side in batch_priority.sides(profile))
    for config in (sparse, dense):
        config.validate()
    assert sparse.model.moe_layers and not dense.model.moe_layers
    assert sparse.model.moe.group_size == 8 * sparse.model.num_tokens


def test_the_table_has_no_empty_cell():
    made = batch_priority.table(planted(0.2))
    assert {len(row) for row in made.rows} == {len(made.columns)}
    assert all(cell for row in made.rows for cell in row)


def test_the_picture(tmp_path):
    figure = Figure(layout="constrained")
    batch_priority.draw(planted(0.2), figure)
    figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 0


def test_hidden_pixels_are_white():
    colors = batch_priority.colored(np.array([[0, 255]]), np.array([[True, False]]))
    np.testing.assert_allclose(colors, [[[1, 1, 1], [0.55, 0.8, 1]]])


class NoiseImages(tfds.core.GeneratorBasedBuilder):
    """Random images of two classes in every split."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None

    def _info(self):
        features = {
            "image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8, encoding="zlib"),
            "label": tfds.features.ClassLabel(num_classes=2),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples() for split in ("train", "validation", "test")}

    def _generate_examples(self):
        rng = np.random.default_rng(0)
        for n in range(20):
            yield n, {"image": rng.integers(0, 256, (8, 8, 1), np.uint8), "label": n % 2}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    builder = NoiseImages(data_dir=tmp_path_factory.mktemp("images"), file_format="array_record")
    builder.download_and_prepare()
    model = VisionConfig(
        num_layers=1,
        width=8,
        num_heads=1,
        head_width=8,
        mlp_width=8,
        num_experts=4,
        moe_every=1,
        image_size=8,
        patch_size=4,
        channels=1,
        num_classes=2,
    )
    model.moe = MoEConfig(
        router=VMoE(),
        capacity=Capacity(1.05, 1.05, CapacityRule.VMOE_ROUND),
        group_size=8 * model.num_tokens,
        experts=model.feed_forward,
    )
    config = Experiment(
        model=model,
        task=ImageClassification(),
        data=ImageData(dataset=str(builder.data_path), image_size=8, num_classes=2, batch_size=8),
        optimizer=AdamW(),
        evaluation=Evaluation(every=2, batches=2),
    )
    run = Run.build(config)
    state = run.initial_state()
    # As if trained: the head starts at 0, with which all images are of the first class.
    parameters = jax.tree.map(
        lambda p: p + 0.3 * jax.random.normal(jax.random.key(p.size), p.shape), state.parameters
    )
    return Trained(tmp_path_factory.mktemp("run"), run, 0, parameters, state.variables)


def test_accuracy_by_capacity(trained, monkeypatch):
    monkeypatch.setattr(batch_priority, "CAPACITIES", (0.1, 4.0))
    measured = pickle.loads(pickle.dumps(batch_priority.BY_CAPACITY)).measure(trained)
    assert list(measured) == list(batch_priority.ORDERS)
    assert all(0 <= value <= 1 for values in measured.values() for value in values)
    # 16 images, and with a slot for every token the order does not matter.
    served = {values[1] for values in measured.values()}
    assert len(served) == 1 and (16 * served.pop()).is_integer()


def test_dropped_patches(trained):
    measured = batch_priority.dropped_patches(trained)
    assert np.shape(measured["images"]) == (6, 8, 8)
    counts = np.sum(measured["dropped"], axis=(1, 2, 3))
    # A group has 40 tokens; at a factor of 0.1 four experts have two slots each.
    assert np.shape(measured["dropped"]) == (4, 6, 2, 2)
    assert list(counts) == sorted(counts)
    assert counts[-1] >= 24 - 8
