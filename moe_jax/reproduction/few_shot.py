"""How well a frozen image classifier's features tell new classes apart, from a few images of each.

The protocol of V-MoE (Riquelme et al. 2021) and Soft MoE, as `vmoe/evaluate/fewshot.py` of
google-research/vmoe does it: ridge regression in closed form from the vectors before the head to
targets of -1 and 1. As there, the strength of the penalty is chosen on the queries themselves, for each
number of shots by the mean rank of its accuracies, in the authors' code over data sets, here over draws.

Axis letters: B images of a batch, N images, Q queries, d features, V classes.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.data.images import ImageData
from moe_jax.data.interface import Pipeline
from moe_jax.errors import UserError
from moe_jax.layers.mode import Mode
from moe_jax.models.abstract_model import Tree
from moe_jax.tasks.image_classification import pixels
from moe_jax.training.trained import Trained

PENALTIES = tuple(2.0**power for power in range(-10, 20))
"""Candidates, as in the authors' configs."""

_BIAS = 100.0
"""The constant feature: so large that its coefficient is hardly penalised."""


@dataclasses.dataclass(frozen=True)
class NewClasses:
    """The classes that are told apart.

    Attributes:
      dataset: a name or a directory, found where the run's own is.
      num_classes: of its labels; those without an image count for nothing.
      support: the split, or a TFDS slice of it, that the few images are drawn from.
      queries: the same, of the images that are classified.
    """

    dataset: str
    num_classes: int
    support: str
    queries: str


HELD_OUT_SCRIPTS = NewClasses("glyphs", 711, "few_shot", "few_shot_test[:50%]")
"""191 letters of scripts that are not in the training split."""

CLOTHES = NewClasses("fashion_mnist", 10, "train[:1000]", "test[:2000]")


def few_shot(
    trained: Trained,
    classes: NewClasses = HELD_OUT_SCRIPTS,
    shots: Sequence[int] = (5, 10),
    draws: int = 5,
) -> dict[str, float]:
    """Accuracy on the queries by the number of images of each class that were seen.

    Args:
      trained: a run of an image classifier of the same size and channels.
      classes: see `NewClasses`.
      shots: images of each class.
      draws: of such images, at random and the same for all runs.

    Returns:
      "5", "10": share of the queries that is right, the mean over draws.

    Raises:
      UserError: the run is of no images, the dataset is not prepared, or a class has too few images.
    """
    data = _data(trained, classes).open(seed=0)
    support, labels = features(trained, data, classes.support)
    queries, answers = features(trained, data, classes.queries)
    fewest = np.min(np.unique_counts(labels).counts)
    if fewest < max(shots):
        raise UserError(
            f"{max(shots)} images of each class are to be drawn, but a class of the split "
            f"{classes.support!r} of dataset={classes.dataset!r} has {fewest}; take fewer."
        )
    accuracies = {shot: np.zeros((draws, len(PENALTIES))) for shot in shots}
    for draw in range(draws):
        order = np.random.default_rng(draw).permutation(len(labels))
        for shot in shots:
            chosen = _first_of_each_class(labels, order, shot)
            accuracies[shot][draw] = ridge_accuracies(
                support[chosen], labels[chosen], queries, answers, PENALTIES
            )
    return {str(shot): float(found[:, _best(found)].mean()) for shot, found in accuracies.items()}


def features(trained: Trained, data: Pipeline, split: str) -> tuple[np.ndarray, np.ndarray]:
    """The frozen model's vectors before the head, of all images of a split.

    Returns:
      float64 [N, d]; labels [N].
    """
    run = trained.run

    def step(parameters: Tree, variables: Tree, batch: dict[str, jax.Array]) -> jax.Array:
        model = run.abstract_model.merge(parameters, variables)
        return model.features(pixels(batch["image"]), batch["mask"], Mode.EVALUATE)[0]

    compiled = jax.jit(step, out_shardings=NamedSharding(run.mesh, PartitionSpec()))
    vectors, labels = [], []
    with jax.set_mesh(run.mesh):
        for batch in data.held_out_batches(split, _ALL):
            placed = run.put_batch(batch)
            batch_vectors = compiled(trained.parameters, trained.variables, placed)
            vectors.append(np.asarray(batch_vectors, np.float64)[batch["mask"]])
            labels.append(batch["label"][batch["mask"]])
    return np.concatenate(vectors), np.concatenate(labels)


_ALL = 2**31
"""Batches, at most."""


def ridge_accuracies(
    support: np.ndarray,
    labels: np.ndarray,
    queries: np.ndarray,
    answers: np.ndarray,
    penalties: Sequence[float],
) -> np.ndarray:
    """Accuracy of ridge regression to targets of -1 and 1 for each penalty.

    Features are shifted and scaled to mean 0 and deviation 1 over the support; a constant 100 joins
    them. W = (X^T X + penalty I)^-1 X^T Y, from one eigendecomposition for all penalties.

    Args:
      support: float64 [N, d].
      labels: int [N].
      queries: float64 [Q, d].
      answers: int [Q].
      penalties: above 0.

    Returns:
      [len(penalties)] share of the queries that is right.
    """
    mean, deviation = support.mean(axis=0), support.std(axis=0) + 1e-5
    x, q = (
        np.pad((features - mean) / deviation, ((0, 0), (0, 1)), constant_values=_BIAS)
        for features in (support, queries)
    )
    known = np.unique(labels)
    targets = np.where(labels[:, None] == known, 1.0, -1.0)
    values, vectors = np.linalg.eigh(x.T @ x)
    projected, rotated = vectors.T @ (x.T @ targets), q @ vectors
    accuracies = []
    for penalty in penalties:
        scores = rotated @ (projected / (values + penalty)[:, None])
        accuracies.append((known[scores.argmax(axis=1)] == answers).mean())
    return np.array(accuracies)


def _data(trained: Trained, classes: NewClasses) -> ImageData:
    """The new classes' images, in the run's size and batches."""
    data = trained.run.config.data
    if not isinstance(data, ImageData):
        raise UserError(
            f"workdir {trained.workdir} holds a run on {type(data).__name__}, not on images; name a "
            "run of an image classifier."
        )
    return dataclasses.replace(
        data,
        dataset=classes.dataset,
        num_classes=classes.num_classes,
        train_split=classes.support,
        domains_are_classes=False,
    )


def _first_of_each_class(labels: np.ndarray, order: np.ndarray, count: int) -> np.ndarray:
    """Indices of the first `count` images of each class in an order of all."""
    chosen = [order[labels[order] == label][:count] for label in np.unique(labels)]
    return np.concatenate(chosen)


def _best(accuracies: np.ndarray) -> int:
    """The penalty of the best mean rank; accuracies [draws, penalties]."""
    ranks = accuracies.argsort(axis=1).argsort(axis=1)
    return int(np.argmax(ranks.mean(axis=0)))
