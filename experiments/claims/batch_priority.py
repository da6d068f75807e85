"""Batch priority keeps accuracy where buffers are small at inference (V-MoE)."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from experiments.claims import _images
from moe_jax.analysis.figures import DENSE, NEUTRAL, SPARSE
from moe_jax.models.vision import Pooling
from moe_jax.reproduction.claim import TEST, Claim, Measurement, Profile, ResultTable, Side
from moe_jax.reproduction.measurements import with_changes
from moe_jax.reproduction.results import FinishedRun, Results
from moe_jax.reproduction.verdicts import Finding, compare, describe
from moe_jax.routing.capacity import Capacity, CapacityRule
from moe_jax.routing.priority import Priority
from moe_jax.routing.token_choice import VMoE
from moe_jax.tasks.task import ObservedLayer
from moe_jax.training.step import evaluation_step
from moe_jax.training.trained import Trained

CAPACITIES = tuple(tenths / 10 for tenths in range(1, 11))
"""Capacity factors at inference."""

ORDERS = {
    Priority.CHOICE: ("vanilla", DENSE),
    Priority.BATCH_PRIORITY: ("batch priority", SPARSE),
    Priority.ASSIGNMENT_PRIORITY: ("assignment-level priority", "#009E73"),
}
"""Priority -> its name and colour."""

DRAWN_CAPACITIES = (1.0, 0.5, 0.3, 0.1)
DRAWN_IMAGES = 6
PATCH_SIZE = 4
IMAGES_PER_GROUP = 8

STATEMENT = """
V-MoE serves first choices left to right, and what finds a full buffer is dropped. With Batch
Prioritized Routing tokens are served in descending order of their largest gate, so that the least
important patches are dropped: quality at inference is kept down to a capacity factor of about 0.5
(curves in the section on Batch Prioritized Routing; as remembered, the dense model's quality is still
reached at about 0.15). Here a V-MoE (top-2, factor 1.05, groups of 8 images) is trained on
Fashion-MNIST in the vanilla order, and the same parameters are evaluated at factors of 0.1 to 1.0 in
the vanilla order, with batch priority, and with assignment-level priority, which serves single
(token, expert) pairs and of which the paper prints nothing. So a finding compares evaluations of the
same parameters: the gain of each seed is compared with 0.

The paper's models see 224 x 224 photographs in 49 to 256 patches; ours 28 x 28 pixels in 49. Slots are
rounded as in the paper in training (to a multiple of 4), at inference to the next whole number. The
dense twin has the same backbone, as in the paper; a V-MoE layer of top-2 computes about twice its
feed-forward FLOPs at a factor of 1, and as much at 0.5. Training with batch priority is not tested.
""".strip()


def at_capacity(order: Priority, factor: float) -> dict[str, Any]:
    """Changes for inference; slots are rounded up to the next whole number, not to multiples of 4."""
    return {
        "model.moe.router.order": order,
        "model.moe.capacity": Capacity(1.05, factor, CapacityRule.SWITCH),
    }


def accuracy_by_capacity(trained: Trained) -> dict[str, list[float]]:
    """Priority -> share of the test images that is right at each of CAPACITIES."""
    data = trained.open_data()
    batches = data.held_out_batches("test", trained.run.config.evaluation.batches)
    placed = [trained.run.put_batch(batch) for batch in batches]

    def accuracy(order: Priority, factor: float) -> float:
        run = with_changes(trained, at_capacity(order, factor)).run
        step = jax.jit(evaluation_step(run.abstract_model, run.config.task, len(data.domains)))
        with jax.set_mesh(run.mesh):
            sums = [
                jax.device_get(step(trained.parameters, trained.variables, batch)["accuracy"])
                for batch in placed
            ]
        right, count = np.sum(sums, axis=(0, 2))
        return float(right / count)

    return {order: [accuracy(order, factor) for factor in CAPACITIES] for order in ORDERS}


def dropped_patches(trained: Trained) -> dict[str, Any]:
    """Which patches batch priority drops in the first MoE layer of a few test images.

    Returns:
      `images`: DRAWN_IMAGES of [H][W] grey values in 0 ... 255; `dropped`: for each of
      DRAWN_CAPACITIES, for each image, [grid][grid] whether no expert served the patch.
    """
    batch = trained.open_data().held_out_batches("test", 1)[0]
    order = Priority.BATCH_PRIORITY
    dropped = [
        unserved(with_changes(trained, at_capacity(order, factor)), batch)[:DRAWN_IMAGES].tolist()
        for factor in DRAWN_CAPACITIES
    ]
    return {"images": batch["image"][:DRAWN_IMAGES, :, :, 0].tolist(), "dropped": dropped}


def unserved(trained: Trained, batch: dict[str, np.ndarray]) -> np.ndarray:
    """[B, grid, grid] bool, patches of which no choice found a slot in the first MoE layer."""
    run = trained.run
    model: Any = run.config.model

    @jax.jit
    def observe(parameters: Any, variables: Any, batch: Any) -> ObservedLayer:
        layers = run.config.task.observe(run.abstract_model.merge(parameters, variables), batch)
        return layers[model.moe_layers[0]]

    with jax.set_mesh(run.mesh):
        layer = observe(trained.parameters, trained.variables, run.put_batch(batch))
    assignment = layer.routing.assignment
    served = np.asarray(assignment.position_in_expert < assignment.capacity).any(axis=-1)
    # The class token comes first.
    patches = served.reshape(-1, model.num_tokens)[:, model.num_tokens - model.grid**2 :]
    return ~patches.reshape(-1, model.grid, model.grid)


BY_CAPACITY = Measurement("test accuracy by order and inference capacity", accuracy_by_capacity)
DROPPED = Measurement("patches dropped by batch priority", dropped_patches)


def sides(profile: Profile) -> list[Side]:
    """The V-MoE, trained in the vanilla order, and its dense twin."""
    model = _images.backbone(profile)
    tokens = (model.image_size // PATCH_SIZE) ** 2 + 1
    shared = {
        **_images.dataset("fashion_mnist", 10),
        "model.patch_size": PATCH_SIZE,
        "model.pooling": Pooling.TOKEN,
    }
    sparse = {
        "model.num_experts": 8,
        "model.moe_every": 2,
        "model.moe_at": (),
        "model.moe.router": VMoE(),
        "model.moe.capacity": Capacity(1.05, 1.05, CapacityRule.VMOE_ROUND),
        "model.moe.group_size": IMAGES_PER_GROUP * tokens,
    }
    measurements = (TEST, BY_CAPACITY, DROPPED)
    return [
        _images.side(profile, "V-MoE", {**shared, **sparse}, measurements),
        _images.side(profile, "dense", {**shared, **_images.DENSE}),
    ]


def accuracy(run: FinishedRun, order: Priority, factor: float) -> float:
    """Percent of the test images; 0 if the run diverged."""
    if run.diverged_at is not None:
        return 0.0
    return 100 * run.measured[BY_CAPACITY.name][order][CAPACITIES.index(factor)]


def findings(results: Results) -> list[Finding]:
    """What small buffers cost in the vanilla order, and how much of it batch priority saves."""
    runs = results["V-MoE"].runs
    vanilla, priority = Priority.CHOICE, Priority.BATCH_PRIORITY

    def lost(run: FinishedRun, order: Priority, factor: float) -> float:
        return accuracy(run, vanilla, 1.0) - accuracy(run, order, factor)

    def positive(statement: str, paper: str, gains: Sequence[float]) -> Finding:
        return compare(statement, paper, gains, [0.0], unit="points")

    curves = "curves without printed figures (V-MoE, section on Batch Prioritized Routing)"
    return [
        positive(
            "In the vanilla order, accuracy is lower at a capacity factor of 0.2 than at 1.0",
            curves,
            [lost(run, vanilla, 0.2) for run in runs],
        ),
        *(
            positive(
                f"At a capacity factor of {factor}, batch priority is more accurate than the "
                "vanilla order",
                curves,
                [lost(run, vanilla, factor) - lost(run, priority, factor) for run in runs],
            )
            for factor in (0.5, 0.2)
        ),
        positive(
            "At 0.5, batch priority loses less than half of the accuracy that the vanilla order "
            "loses, each against the vanilla order at 1.0",
            "quality is kept down to about 0.5 (V-MoE)",
            [lost(run, vanilla, 0.5) / 2 - lost(run, priority, 0.5) for run in runs],
        ),
    ]


def table(results: Results) -> ResultTable:
    """A row for each inference capacity, and the dense twin."""
    columns = [
        "inference capacity factor",
        *(f"test accuracy (%), {name}" for name, _ in ORDERS.values()),
        "V-MoE's figures",
    ]
    runs = results["V-MoE"].runs
    rows = [
        [
            f"{factor:g}",
            *(describe([accuracy(run, order, factor) for run in runs]) for order in ORDERS),
            "curves only",
        ]
        for factor in CAPACITIES
    ]
    dense = describe(results["dense"].sample(_images.test_accuracy))
    return ResultTable(columns, [*rows, ["dense twin", dense, "-", "-", "curves only"]])


def draw(results: Results, figure: Figure) -> None:
    """Accuracy against inference capacity, and dropped patches on images."""
    figure.set_size_inches(11, 5.4)
    grid = figure.add_gridspec(1, 2, width_ratios=(1.1, 1))
    _draw_accuracy(figure.add_subplot(grid[0]), results)
    finished = [run for run in results["V-MoE"].runs if run.diverged_at is None]
    if finished:
        _draw_dropped(figure.add_subfigure(grid[1]), finished[0])


def _draw_accuracy(axes: Axes, results: Results) -> None:
    """A faint line for each seed, and one through the means."""
    for order, (name, color) in ORDERS.items():
        curves = [[accuracy(r, order, c) for c in CAPACITIES] for r in results["V-MoE"].runs]
        for curve in curves:
            axes.plot(CAPACITIES, curve, ".-", color=color, linewidth=0.7, alpha=0.4)
        mean = np.mean(curves, axis=0)
        axes.plot(CAPACITIES, mean, color=color, linewidth=2, label=f"{name}, mean (faint: seeds)")
    for i, value in enumerate(results["dense"].sample(_images.test_accuracy)):
        label = "dense twin, each seed" if i == 0 else None
        axes.axhline(value, color=NEUTRAL, linestyle="--", linewidth=1, label=label)
    axes.set(
        xlabel="capacity factor at inference",
        ylabel="test accuracy (%)",
        title="The same parameters, trained at 1.05 in the vanilla order",
    )
    axes.legend(fontsize=8)


def _draw_dropped(figure: SubFigure, run: FinishedRun) -> None:
    """A column for each image and a row for each capacity; dropped patches are white."""
    drawn = run.measured[DROPPED.name]
    images = np.array(drawn["images"])
    figure.suptitle(
        "Dropped in the first MoE layer (white)\nbatch priority, first seed, by capacity factor",
        fontsize=11,
    )
    panels = figure.subplots(len(DRAWN_CAPACITIES), len(images), squeeze=False)
    for row, factor, dropped in zip(panels, DRAWN_CAPACITIES, drawn["dropped"], strict=True):
        row[0].set_ylabel(f"{factor:g}")
        for axes, image, patches in zip(row, images, dropped, strict=True):
            mask = np.array(patches, bool)
            side = len(image) // len(mask)
            hidden = np.kron(mask, np.ones((side, side), bool))
            axes.imshow(colored(image, hidden))
            axes.set_xticks([])
            axes.set_yticks([])


def colored(image: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """[H, W, 3] the image in blue tones, white where hidden: its own pixels may be white, too."""
    grey = image[..., None] / 255
    tones = grey * np.array([0.55, 0.8, 1.0]) + (1 - grey) * np.array([0.0, 0.1, 0.25])
    return np.where(hidden[..., None], 1.0, tones)


CLAIM = Claim(
    name="batch_priority",
    title="Batch priority keeps accuracy where buffers are small at inference",
    statement=STATEMENT,
    sides=sides,
    findings=findings,
    table=table,
    draw=draw,
)
