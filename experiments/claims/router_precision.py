"""A router in bfloat16 makes training diverge, and one in float32 is enough against it (Switch)."""

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.claims import _stability, _text
from moe_jax.analysis.figures import NEUTRAL, SPARSE
from moe_jax.models.stack import ComputeDtype
from moe_jax.reproduction.claim import Claim, Profile, ResultTable, Side
from moe_jax.reproduction.results import FinishedRun, Results, SideResult
from moe_jax.reproduction.verdicts import Finding, compare, describe
from moe_jax.routing.scores import RouterDtype

PRECISIONS = {
    "float32": (ComputeDtype.FLOAT32, RouterDtype.FLOAT32),
    "selective": (ComputeDtype.BFLOAT16, RouterDtype.FLOAT32),
    "bfloat16": (ComputeDtype.BFLOAT16, RouterDtype.BFLOAT16),
}
"""Side -> what the model computes in, and its routers."""

PUBLISHED = {"float32": 1.718, "selective": 1.716, "bfloat16": 3.780}
"""Loss in nats per token (Switch, Table 2)."""

STEPS = {Profile.CPU: 400, Profile.GPU: 1000}
LEARNING_RATES = {Profile.CPU: 4e-2, Profile.GPU: 5e-3}
"""Five times that of the config."""

RISE = 1.0
"""Nats by which the training loss of a run that diverged ends above its lowest."""

TIE = 0.05
"""Nats per byte that selective precision may lose to float32; bfloat16 lost 2.1 in the paper."""

COLORS = {"float32": NEUTRAL, "selective": SPARSE, "bfloat16": "#E69F00"}

STATEMENT = f"""
Switch (Table 2) prints a negative log perplexity of -1.718 for a model in float32, -3.780 for one in
bfloat16, which diverged, and -1.716 for selective precision: bfloat16 with a router in float32,
cast back before tokens are sent. ST-MoE (Figure 2) gives the reason: logits in [32, 64) are 0.25
apart in bfloat16, and the softmax turns an error of a logit into a relative error of the gate as large.

Here a small decoder with 32 experts is trained in the three precisions at five times its usual
learning rate, which is meant to provoke what only large models show otherwise, over 5 seeds; where no
seed diverges, it did not, and the claim has not been put to the test. Parameters and
their moments are float32 in all of them; a bfloat16 router rounds its inputs, weights, logits,
probabilities and gates. A seed has diverged if its loss or gradients became infinite, or if its
training loss ends more than {RISE:g} nat above its lowest. "No worse" allows {TIE:g} nats per byte.
Unlike in the paper, the optimizer is AdamW with gradients clipped to a norm of 1, the model is
shallow and the runs are short: all of that is more forgiving. On a CPU bfloat16 saves no time, so
that the paper's other half, selective precision is as fast as bfloat16, is not tested.
"""


def sides(profile: Profile) -> list[Side]:
    """32 experts in each precision, at one demanding learning rate."""
    shared = {**_stability.EXPERTS, "steps": STEPS[profile]}
    return [
        _text.side(
            profile,
            name,
            {**shared, "model.dtype": model, "model.moe.router.dtype": router},
            learning_rates=(LEARNING_RATES[profile],),
            seeds=_stability.SEEDS,
        )
        for name, (model, router) in PRECISIONS.items()
    ]


def findings(results: Results) -> list[Finding]:
    """Loss and divergence of a bfloat16 router, and the tie of selective precision with float32."""
    full, selective, narrow = (results[name] for name in PRECISIONS)
    return [
        compare(
            "A bfloat16 router ends at a higher test loss than a float32 router in the same model",
            "3.780 against 1.716 (Switch, Table 2)",
            narrow.test_losses, selective.test_losses, unit="nats per byte",
        ),
        compare(
            "More seeds diverge with a bfloat16 router than with a float32 router",
            "bfloat16 diverged, selective precision did not (Switch, Table 2; one run each)",
            narrow.sample(diverged), selective.sample(diverged), unit="as the share that diverged",
        ),
        compare(
            f"Selective precision is no worse than float32: float32's test loss + {TIE:g} is higher",
            "1.716 against 1.718 (Switch, Table 2)",
            [loss + TIE for loss in full.test_losses], selective.test_losses, unit="nats per byte",
        ),
    ]  # fmt: skip


def diverged(run: FinishedRun) -> float:
    """1 for a run that diverged, else 0."""
    if run.diverged_at is not None:
        return 1.0
    _, losses = run.series("train/loss")
    return float(losses[-1] > losses.min() + RISE)


def table(results: Results) -> ResultTable:
    """A row for each precision, with the paper's."""
    columns = [
        "precision",
        "model",
        "router",
        "test loss here (nats per byte)",
        "diverged seeds",
        "Switch, Table 2 (nats per token)",
    ]
    return ResultTable(columns, [_row(results[name], name) for name in PRECISIONS])


def _row(side: SideResult, name: str) -> list[str]:
    model, router = PRECISIONS[name]
    count = f"{sum(side.sample(diverged)):.0f} of {len(side.runs)}"
    paper = f"{PUBLISHED[name]:.3f}" + (" (diverged)" if name == "bfloat16" else "")
    return [name, model.value, router.value, describe(side.test_losses), count, paper]


def draw(results: Results, figure: Figure) -> None:
    """Loss by precision, the paper's, and the curves of all seeds."""
    figure.set_size_inches(11, 3.8)
    ours, paper, curves = figure.subplots(1, 3, width_ratios=[1, 1, 1.3])
    losses = {name: side.test_losses for name, side in results.sides.items()}
    _stability.draw_samples(ours, losses, COLORS, "test loss (nats per byte)")
    ours.set_title("Here: each seed,\nmean and standard deviation", fontsize=10)
    _draw_paper(paper)
    rate = next(iter(results.sides.values())).learning_rate
    title = f"Each seed, learning rate {rate:g}"
    _stability.draw_training(curves, results.sides, COLORS, title)


def _draw_paper(axes: Axes) -> None:
    axes.bar(list(PUBLISHED), list(PUBLISHED.values()), color=NEUTRAL, alpha=0.4, width=0.6)
    for place, loss in enumerate(PUBLISHED.values()):
        axes.annotate(f"{loss:.3f}", (place, loss), ha="center", va="bottom", fontsize=8)
    axes.set_ylabel("loss (nats per token)")
    axes.set_ylim(0, math.ceil(max(PUBLISHED.values())))
    axes.set_title("Switch, Table 2\n(one run each; bfloat16 diverged)", fontsize=10)


CLAIM = Claim(
    name="router_precision",
    title="A router in bfloat16 makes training diverge, and float32 in the router alone prevents it",
    statement=STATEMENT.strip(),
    sides=sides,
    findings=findings,
    table=table,
    draw=draw,
)
