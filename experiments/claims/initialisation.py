"""A smaller initialisation makes the beginning of training better and more stable (Switch)."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.claims import _stability, _text
from moe_jax.analysis.figures import NEUTRAL, SPARSE
from moe_jax.reproduction.claim import Claim, Profile, ResultTable, Side
from moe_jax.reproduction.results import FinishedRun, Results, SideResult
from moe_jax.reproduction.verdicts import Finding, compare, describe
from moe_jax.training.optimizers import Adafactor

SCALES = (0.01, 0.1, 1.0)
"""s of the truncated normal with variance s / fan_in; 1.0 is the Transformer's own."""

PUBLISHED = {0.1: (2.72, 0.01), 1.0: (3.60, 0.68)}
"""Scale -> mean and standard deviation of the loss in nats per token (Switch, Table 3)."""

STEPS = {Profile.CPU: 300, Profile.GPU: 1000}
LEARNING_RATE = 3e-2

COLORS = {"s = 0.01": "#009E73", "s = 0.1": SPARSE, "s = 1": "#E69F00"}

STATEMENT = """
Switch draws matrices from a truncated normal of deviation sqrt(s / n), n the fan-in, and recommends
s = 0.1 instead of the Transformer's 1.0. Its Table 3 prints the negative log perplexity of models
with 32 experts after 3,500 steps, over 3 seeds: -2.72 with a standard deviation of 0.01 for s = 0.1,
and -3.60 with 0.68 for s = 1.0.

Here a small decoder with 32 experts is trained for 300 steps (1,000 in the GPU profile) over
5 seeds and its loss on the validation split is compared, and then how far each seed is from the
median of its side (the test of Brown and Forsythe for equal variances). The optimizer is Adafactor
at a constant rate, as Switch's is in its first 10,000 steps: its updates are proportional to the
size of a matrix, so that a smaller scale means smaller steps too, which Adam's do not follow. The
rate is the same for all scales, 0.03 in place of 0.01: a demanding one, because with a rate chosen
for each scale an instability is what the choice avoids, and because these runs are a tenth as long.
Unlike in the paper the model is small, which is more forgiving; the embedding table starts at unit
variance and the router's weights at 1 over the root of the width whatever the scale; and gates are
multiplied by 8, so that an expert's output counts from the start. As updates are proportional to the
weights, a smaller scale has also moved less after so few steps: where no scale is unstable, this
compares their speed, while the 0.68 of Table 3 is of instability. s = 0.01 is not in the paper.
"""


def side_name(scale: float) -> str:
    """Of the side that begins with a scale."""
    return f"s = {scale:g}"


def sides(profile: Profile) -> list[Side]:
    """32 experts from each scale, at one learning rate."""
    steps = STEPS[profile]
    shared = {
        **_stability.EXPERTS,
        "optimizer": Adafactor(),
        "steps": steps,
        "evaluation.every": steps // 2,
    }
    return [
        _text.side(
            profile,
            side_name(scale),
            {**shared, "model.init_scale": scale},
            learning_rates=(LEARNING_RATE,),
            seeds=_stability.SEEDS,
        )
        for scale in SCALES
    ]


def findings(results: Results) -> list[Finding]:
    """The early loss, and its spread over seeds."""
    small, large = (losses_at_end(results[side_name(scale)]) for scale in (0.1, 1.0))
    steps = results[side_name(0.1)].config.steps
    return [
        compare(
            f"The loss after {steps} steps is higher from s = 1.0 than from s = 0.1",
            "3.60 against 2.72 after 3,500 steps (Switch, Table 3)",
            large, small, unit="nats per byte",
        ),
        compare(
            f"The loss after {steps} steps spreads more over seeds from s = 1.0 than from s = 0.1 "
            "(absolute deviation from the median)",
            "standard deviation 0.68 against 0.01 (Switch, Table 3)",
            deviations(large), deviations(small), unit="nats per byte",
        ),
    ]  # fmt: skip


def losses_at_end(side: SideResult) -> list[float]:
    """Validation loss of each seed at the last step."""
    return side.sample(lambda run: loss_at(side.config.steps, run))


def loss_at(step: int, run: FinishedRun) -> float:
    """Validation loss at a step that evaluates; infinite if the run diverged."""
    if run.diverged_at is not None:
        return math.inf
    steps, losses = run.series("eval/loss")
    return float(losses[list(steps).index(step)])


def deviations(sample: Sequence[float]) -> list[float]:
    """|x - median| of each x; infinite for all if most seeds diverged."""
    median = float(np.median(sample))
    return [abs(x - median) if math.isfinite(median) else math.inf for x in sample]


def table(results: Results) -> ResultTable:
    """A row for each scale, with the paper's."""
    end = results[side_name(1.0)].config.steps
    columns = [
        "scale s",
        f"loss at step {end // 2} (nats per byte)",
        f"loss at step {end} (nats per byte)",
        f"standard deviation over seeds at step {end}",
        "diverged seeds",
        "Switch, Table 3: loss at step 3,500 (nats per token)",
        "Switch, Table 3: standard deviation",
    ]
    return ResultTable(columns, [_row(results[side_name(scale)], scale, end) for scale in SCALES])


def _row(side: SideResult, scale: float, end: int) -> list[str]:
    losses = losses_at_end(side)
    diverged = sum(math.isinf(loss) for loss in losses)
    spread = "infinite" if diverged else f"{np.std(losses, ddof=1):.3g}"
    paper = [f"{value:.2f}" for value in PUBLISHED[scale]] if scale in PUBLISHED else ["-", "-"]
    early = describe(side.sample(lambda run: loss_at(end // 2, run)))
    return [f"{scale:g}", early, describe(losses), spread, f"{diverged} of {len(losses)}", *paper]


def draw(results: Results, figure: Figure) -> None:
    """Loss by scale with its spread, the paper's, and the curves of all seeds."""
    figure.set_size_inches(11, 3.8)
    ours, paper, curves = figure.subplots(1, 3, width_ratios=[1, 0.8, 1.3])
    steps = results[side_name(1.0)].config.steps
    losses = {name: losses_at_end(side) for name, side in results.sides.items()}
    _stability.draw_samples(ours, losses, COLORS, "validation loss (nats per byte)")
    ours.set_title(f"Here, step {steps}: each seed,\nmean and standard deviation", fontsize=10)
    _draw_paper(paper)
    _stability.draw_training(curves, results.sides, COLORS, "Each seed")


def _draw_paper(axes: Axes) -> None:
    for place, (mean, deviation) in enumerate(PUBLISHED.values()):
        _stability.draw_mean(axes, place, mean, deviation, NEUTRAL)
    axes.set_xticks(range(len(PUBLISHED)), [side_name(scale) for scale in PUBLISHED])
    axes.set_xlim(-0.5, len(PUBLISHED) - 0.5)
    axes.set_ylabel("loss (nats per token)")
    axes.set_title("Switch, Table 3, step 3,500:\nmean and standard deviation", fontsize=10)


CLAIM = Claim(
    name="initialisation",
    title="A smaller initialisation makes the beginning of training better and more stable",
    statement=STATEMENT.strip(),
    sides=sides,
    findings=findings,
    table=table,
    draw=draw,
)
