"""Soft MoE beats expert choice, token choice and dense models at equal FLOPs (Soft MoE)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.claims import _images
from moe_jax.analysis.figures import DENSE, NEUTRAL, SPARSE
from moe_jax.layers.attention import MultiHead, Positions, QKNorm
from moe_jax.layers.moe import MoEConfig
from moe_jax.models.vision import Pooling
from moe_jax.reproduction.claim import TEST, Claim, Measurement, Profile, ResultTable, Side
from moe_jax.reproduction.few_shot import few_shot
from moe_jax.reproduction.results import FinishedRun, Results
from moe_jax.reproduction.verdicts import Finding, compare, describe
from moe_jax.routing.capacity import Capacity, CapacityRule
from moe_jax.routing.expert_choice import ExpertChoice
from moe_jax.routing.priority import Priority
from moe_jax.routing.router import Router
from moe_jax.routing.soft import SoftMoE, SoftVariant
from moe_jax.routing.token_choice import VMoE

FEW_SHOT = Measurement("few-shot accuracy", few_shot)

LETTERS = 711
"""Classes of the glyphs: of the training scripts and of those held out for few-shot classification."""

TRAINING: Mapping[Profile, Mapping[str, Any]] = {
    Profile.CPU: {
        **_images.dataset("fashion_mnist", 10),
        "steps": 750,
        "evaluation.every": 250,
        "model.patch_size": 7,
    },
    Profile.GPU: {
        **_images.dataset("glyphs", LETTERS),
        "data.image_size": 32,
        "model.image_size": 32,
        "model.patch_size": 4,
    },
}
"""Changes of data, steps and patches, of which an image has 16 and 64. On a CPU no letters, because
after 500 steps of 64 images 2% to 4% of the 711 were told apart."""

EXPERTS = {Profile.CPU: (2, 4, 8, 16), Profile.GPU: (8, 16, 32, 64)}
"""Experts that share the slots of an image, of which there are as many as patches; the last: one
slot for each, as in the paper."""

IMAGES_PER_GROUP = 8
"""That compete for slots under token and expert choice."""

DENSE_TWIN, TOKEN_CHOICE, EXPERT_CHOICE, SOFT = "dense", "token choice", "expert choice", "Soft MoE"
ROUTERS = (DENSE_TWIN, TOKEN_CHOICE, EXPERT_CHOICE, SOFT)

LADDER = {
    "identity": SoftVariant.IDENTITY,
    "uniform": SoftVariant.UNIFORM,
    "uniform / soft": SoftVariant.UNIFORM_SOFT,
    "soft / uniform": SoftVariant.SOFT_UNIFORM,
}
"""Ablations between the dense twin and Soft MoE, dispatch / combine."""

RUNGS = (DENSE_TWIN, *LADDER, SOFT)

PUBLISHED: Mapping[str, tuple[float, float]] = {
    SOFT: (54.3, 74.8),
    "soft / uniform": (53.6, 72.0),
    "uniform / soft": (52.6, 71.8),
    "uniform": (51.8, 70.0),
    "identity": (51.5, 69.1),
    DENSE_TWIN: (48.3, 62.3),
}
"""Side -> precision at 1 on JFT and 10-shot accuracy on ImageNet in percent (Soft MoE, Table 2)."""

STATEMENT = f"""
Soft MoE reports that at equal training cost it is better than expert choice and token choice, and
those than dense Vision Transformers (Figure 3), and takes itself apart in Table 2 (JFT precision at 1
/ ImageNet 10-shot): both mixtures learned 54.3 / 74.8, uniform combine 53.6 / 72.0, uniform dispatch
52.6 / 71.8, both uniform 51.8 / 70.0, identity 51.5 / 69.1, dense 48.3 / 62.3. With the slots fixed,
more experts are always better for Soft MoE, which is not so for the sparse routers (Figure 6).

Here small Vision Transformers learn Fashion-MNIST (GPU profile: letters of 12 scripts, drawn from
fonts), on whose test images accuracy is measured; few-shot accuracy is that of ridge regression in
closed form on frozen features, as in the papers' protocol, for letters of five scripts that no run is
trained on, with the penalty that is best for them. Experts replace the feed-forward layers of the last
half of the blocks, with as many slots as patches, so that all sides compute the same apart from
routing. Token choice is V-MoE's with k = 1, a capacity factor of 1 and batch priority; expert choice
has 1 expert per token on average; groups of both are {IMAGES_PER_GROUP} images, Soft MoE's is one.
Differences: 16 patches of 7 x 7 pixels on a CPU (paper, Table 1: 196 or 256), no JFT or ImageNet, less
than one epoch on a CPU, and a softmax in place of sigmoids. Gates of token and expert choice are softmax
probabilities, as in their papers; with 16 experts an expert's output so starts small, and the sides
have their own learning rates. Identity routing gives each position of the image an expert of its own:
on a CPU each of 16 patches of a garment that is always centred, in the paper each of 196 or 256 patches
of all sorts of photographs.

Expert choice against token choice is contested: its authors find it better than top-2 and twice as
fast in steps, Soft MoE finds it better than token choice on images (Figure 3), and OLMoE (its Figure
7) finds for text that token choice without drops is better. No finding compares the two; the table
shows both.
""".strip()


def sides(profile: Profile) -> list[Side]:
    """The four routers, the ablations of Soft MoE, and fewer experts with as many slots."""
    *fewer, tokens = EXPERTS[profile]
    sparse_group = IMAGES_PER_GROUP * tokens

    def routed(name: str, router: Router, capacity: Capacity | None = None) -> Side:
        return _routed(profile, name, tokens, router, sparse_group, capacity)

    def soft(name: str, experts: int, variant: SoftVariant = SoftVariant.SOFT) -> Side:
        router = SoftMoE(slots_per_expert=tokens // experts, variant=variant)
        return _routed(profile, name, experts, router, group_size=tokens)

    return [
        _side(profile, DENSE_TWIN, _images.DENSE),
        routed(
            TOKEN_CHOICE,
            VMoE(k=1, order=Priority.BATCH_PRIORITY),
            Capacity(1.0, 1.0, CapacityRule.SWITCH),
        ),
        routed(EXPERT_CHOICE, ExpertChoice(), Capacity(1.0, 1.0, CapacityRule.EXPERT_CHOICE)),
        soft(SOFT, tokens),
        *(soft(name, tokens, variant) for name, variant in LADDER.items()),
        *(soft(with_experts(experts), experts) for experts in fewer),
    ]


def with_experts(experts: int) -> str:
    """Name of the side with fewer experts than slots."""
    return f"{SOFT}, {experts} experts"


def _routed(
    profile: Profile,
    name: str,
    experts: int,
    router: Router,
    group_size: int,
    capacity: Capacity | None = None,
) -> Side:
    model = _images.backbone(profile)
    moe = MoEConfig(
        router=router,
        capacity=capacity or Capacity(),
        group_size=group_size,
        experts=model.feed_forward,
    )
    changes = {
        "model.num_experts": experts,
        "model.moe_at": tuple(range(model.num_layers // 2, model.num_layers)),
        "model.moe": moe,
    }
    return _side(profile, name, changes)


def _side(profile: Profile, name: str, changes: Mapping[str, Any]) -> Side:
    """With Soft MoE's backbone: no class token, normalized queries and keys."""
    attention = MultiHead(
        positions=Positions.NONE, qkv_bias=True, out_bias=True, qk_norm=QKNorm.HEAD
    )
    shared = {
        **TRAINING[profile],
        "model.pooling": Pooling.GAP,
        "model.attention": attention,
    }
    return _images.side(profile, name, {**shared, **changes}, (TEST, FEW_SHOT))


def ten_shot(run: FinishedRun) -> float:
    """Percent; 0 if the run diverged."""
    return 0.0 if run.diverged_at is not None else 100 * run.measured[FEW_SHOT.name]["10"]


def findings(results: Results) -> list[Finding]:
    """The order of the routers, the ablations, and the number of experts."""

    def better(
        first: str,
        second: str,
        paper: str,
        value: Callable[[FinishedRun], float] = _images.test_accuracy,
        what: str = "test accuracy",
    ) -> Finding:
        statement = f"{what}: {first} is higher than {second}"
        samples = (results[name].sample(value) for name in (first, second))
        return compare(statement, paper, *samples, unit="%")

    def table_2(first: str, second: str, column: int = 0) -> str:
        return f"{PUBLISHED[first][column]} against {PUBLISHED[second][column]} (Soft MoE, Table 2)"

    order = "curves at equal training cost (Soft MoE, Figure 3)"
    fewest = with_experts(EXPERTS[results.profile][0])
    return [
        better(SOFT, EXPERT_CHOICE, order),
        better(SOFT, TOKEN_CHOICE, order),
        better(EXPERT_CHOICE, DENSE_TWIN, order),
        better(TOKEN_CHOICE, DENSE_TWIN, order),
        better(SOFT, "identity", table_2(SOFT, "identity")),
        better(SOFT, fewest, "more experts at fixed slots are better (Soft MoE, Figure 6)"),
        better(SOFT, DENSE_TWIN, table_2(SOFT, DENSE_TWIN, 1), ten_shot, "10-shot accuracy"),
    ]


def table(results: Results) -> ResultTable:
    """A row for each side."""
    columns = [
        "side",
        "experts x slots for an image",
        "test accuracy (%)",
        "10-shot accuracy (%)",
        "JFT precision at 1 / ImageNet 10-shot (%; Soft MoE, Table 2)",
    ]
    tokens = EXPERTS[results.profile][-1]
    rows = []
    for name, result in results.sides.items():
        model: Any = result.config.model
        experts = model.num_experts
        paper = PUBLISHED.get(name)
        rows.append(
            [
                name,
                "-" if name == DENSE_TWIN else f"{experts} x {tokens / experts:g}",
                describe(result.sample(_images.test_accuracy)),
                describe(result.sample(ten_shot)),
                f"{paper[0]} / {paper[1]}" if paper else "-",
            ]
        )
    return ResultTable(columns, rows)


def draw(results: Results, figure: Figure) -> None:
    """Accuracy by router, the ablations beside the paper's, and accuracy against experts."""
    figure.set_size_inches(11, 8)
    (accuracy, few), (ladder, experts) = figure.subplots(2, 2)
    _draw_routers(accuracy, results, _images.test_accuracy, "test accuracy (%)")
    accuracy.set_title("Routers at equal FLOPs, test images")
    _draw_routers(few, results, ten_shot, "10-shot accuracy (%)")
    few.set_title("The same, few-shot on held-out scripts")
    _draw_ladder(ladder, results)
    _draw_experts(experts, results)


def _draw_routers(
    axes: Axes, results: Results, value: Callable[[FinishedRun], float], label: str
) -> None:
    samples = [results[name].sample(value) for name in ROUTERS]
    colors = [DENSE if name == DENSE_TWIN else SPARSE for name in ROUTERS]
    _points(axes, range(len(ROUTERS)), samples, colors)
    axes.set_xticks(range(len(ROUTERS)), ROUTERS)
    axes.set_xlim(-0.5, len(ROUTERS) - 0.5)
    axes.set_ylabel(label)
    axes.legend(fontsize=8)


def _points(
    axes: Axes, x: Sequence[int], samples: Sequence[Sequence[float]], colors: Sequence[str]
) -> None:
    """A point for each seed, and a bar with one standard error through the mean."""
    for i, (place, sample, color) in enumerate(zip(x, samples, colors, strict=True)):
        error = np.std(sample, ddof=1) / np.sqrt(len(sample))
        axes.plot([place] * len(sample), sample, "o", color=color, markersize=4,
                  label="each seed" if i == 0 else None)  # fmt: skip
        axes.errorbar(place, np.mean(sample), error, fmt="_", color=color, markersize=18, capsize=6,
                      label="mean, one standard error" if i == 0 else None)  # fmt: skip


def _draw_ladder(axes: Axes, results: Results) -> None:
    """Points above the dense twin, ours and the paper's."""
    places = np.arange(len(RUNGS))
    dense = float(np.mean(results[DENSE_TWIN].sample(_images.test_accuracy)))
    for i, rung in enumerate(RUNGS):
        gains = [value - dense for value in results[rung].sample(_images.test_accuracy)]
        label = "here, each seed" if i == 0 else None
        axes.plot([i - 0.15] * len(gains), gains, "o", color=SPARSE, markersize=4, label=label)
    papers = (
        ("JFT precision at 1 (paper)", "s", "#009E73"),
        ("ImageNet 10-shot (paper)", "^", "#CC79A7"),
    )
    for column, (name, marker, color) in enumerate(papers):
        gains = [PUBLISHED[rung][column] - PUBLISHED[DENSE_TWIN][column] for rung in RUNGS]
        axes.plot(places + 0.15, gains, marker, color=color, markersize=5, label=name)
    axes.axhline(0, color=NEUTRAL, linestyle=":", linewidth=1)
    axes.set_xticks(places, [rung.replace(" / ", " /\n") for rung in RUNGS], fontsize=9)
    axes.set(
        ylabel="accuracy less the dense twin's (points)", title="Ablations, dispatch / combine"
    )
    axes.legend(fontsize=8)


def _draw_experts(axes: Axes, results: Results) -> None:
    *fewer, most = EXPERTS[results.profile]
    names = [*map(with_experts, fewer), SOFT]
    samples = [results[name].sample(_images.test_accuracy) for name in names]
    _points(axes, (*fewer, most), samples, [SPARSE] * len(names))
    axes.set_xscale("log", base=2)
    axes.set_xticks((*fewer, most), [str(experts) for experts in (*fewer, most)])
    for i, value in enumerate(results[DENSE_TWIN].sample(_images.test_accuracy)):
        label = "dense twin, each seed" if i == 0 else None
        axes.axhline(value, color=DENSE, linestyle="--", linewidth=1, label=label)
    axes.set(
        xlabel=f"experts that share {most} slots for an image",
        ylabel="test accuracy (%)",
        title="Soft MoE with the slots fixed",
    )
    axes.legend(fontsize=8)


CLAIM = Claim(
    name="soft_moe",
    title="Soft MoE beats other routers, dense models and its own ablations at equal FLOPs",
    statement=STATEMENT,
    sides=sides,
    findings=findings,
    table=table,
    draw=draw,
)
