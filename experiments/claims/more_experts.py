"""More experts at the same FLOPs lower the loss (Switch, Shazeer et al., Clark et al.)."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.claims import _text
from moe_jax.analysis.figures import DENSE, NEUTRAL, SPARSE
from moe_jax.reproduction.claim import Claim, Profile, ResultTable, Side
from moe_jax.reproduction.results import FinishedRun, Results
from moe_jax.reproduction.verdicts import Finding, compare, describe

EXPERTS = (1, 2, 4, 8, 16, 32)
"""E of the sides; 1 is the dense twin."""

PUBLISHED: Mapping[str, Mapping[int, float]] = {
    "Switch, Table 7": {1: 1.636, 16: 1.505, 32: 1.474, 64: 1.444, 128: 1.432, 256: 1.427},
    "Shazeer, Tables 7-8": {
        ratio: math.log(perplexity)
        for ratio, perplexity in {1: 45.0, 8: 39.7, 64: 35.7, 256: 34.6, 1024: 34.1}.items()
    },
    "Clark, 15M, S-BASE": {1: 3.162, 8: 2.986, 64: 2.756, 512: 2.62},
}
"""Paper -> experts for each one that a token visits -> loss in nats per token, Shazeer's per word.

Shazeer's MoE-4 uses all of its 4 experts; MoE-32 and MoE-256 use 4, the hierarchical ones 2 x 2.
"""

PAPER_STYLES = {
    "Switch, Table 7": ("#009E73", "s"),
    "Shazeer, Tables 7-8": ("#CC79A7", "^"),
    "Clark, 15M, S-BASE": ("#E69F00", "D"),
}

STATEMENT = """
Switch (Table 7) prints a negative log perplexity of -1.636 for T5-Base and -1.505, -1.474, -1.444,
-1.432 and -1.427 for 16, 32, 64, 128 and 256 experts of the same FLOPs per token; with 64 it is
where T5-Base is at step 450,000 after 60,000 steps, 7.5 times as fast in steps (Figure 4), and
2 experts gain already (Figure 12). Shazeer et al. (Tables 7 and 8) print perplexities from 45.0
(4 experts, all used) to 34.1 (4,096 experts, 4 used). In the data that Clark et al. published, a
dense model of 15M has 3.162 and S-BASE models of the same size have 2.986, 2.756 and 2.62 with 8,
64 and 512 experts. Returns diminish: Clark et al. fit a saturation, GLaM sees none beyond 64 experts
and ST-MoE little beyond 256.

Here a dense decoder and its twins with E = 2 to 32 experts in every second block (Switch's router,
top-1, balancing loss 0.001) read the same bytes in the same order; each has its own learning rate
from the same grid. Unlike the papers' models these are small and see few bytes; no token is dropped;
router weights begin larger than theirs, so that logits begin as large as those of wider models, and
gates are multiplied by sqrt(2 E). The step speed-up is the steps of the dense twin over the steps
after which a model has the validation loss that the dense twin of the same seed ends with: between
two evaluations the loss is taken to be linear in the logarithm of the step, and a model that never
has that loss counts as 0. The learning rate falls by a cosine until the end of a run, so that a model
on its way is not at its best, where the inverse square root that Switch uses is the same for any
length: the speed-up is rather too small. The slope is that of a straight line, fitted by least
squares to the six test losses of a seed against log2 E (to the papers' likewise), with the dense twin
at E = 1.
"""


def side_name(num_experts: int) -> str:
    """Of the side with E experts."""
    return "dense" if num_experts == 1 else f"{num_experts} experts"


def sides(profile: Profile) -> list[Side]:
    """The dense twin and E experts."""
    longer, rates = _text.LONGER[profile], _text.WIDE_GRID[profile]
    return [
        _text.side(profile, side_name(E), {**longer, **_changes(E)}, learning_rates=rates)
        for E in EXPERTS
    ]


def _changes(num_experts: int) -> Mapping[str, float]:
    if num_experts == 1:
        return _text.DENSE
    if num_experts == 8:
        return {}  # The config's own; other claims share its runs.
    return {
        "model.num_experts": num_experts,
        "model.moe.router.gate_scale": _text.gate_scale(num_experts),
    }


def findings(results: Results) -> list[Finding]:
    """Loss against the dense twin, against more experts, its slope, and the speed in steps."""

    def lower(fewer: int, more: int, statement: str, paper: str) -> Finding:
        larger, smaller = (results[side_name(E)].test_losses for E in (fewer, more))
        return compare(statement, paper, larger, smaller, unit="nats per byte")

    return [
        lower(
            1, 8, "8 experts have a lower test loss than the dense twin of equal FLOPs",
            "3.162 -> 2.986 (Clark et al., 15M, S-BASE)",
        ),
        lower(
            1, 2, "2 experts have a lower test loss than the dense twin already",
            "quality rises with as few as 2 experts (Switch, Figure 12)",
        ),
        lower(
            8, 32, "32 experts have a lower test loss than 8",
            "2.986 -> 2.756 from 8 to 64 experts (Clark et al., 15M, S-BASE); 1.505 -> 1.474 from "
            "16 to 32 (Switch, Table 7)",
        ),
        compare(
            "The test loss falls with log2 E: the slope of a straight line is below 0",
            "-0.027 from 1 to 256 experts (of Switch, Table 7); -0.062 from 1 to 512 (of Clark et "
            "al., 15M)",
            [0.0], slopes(results), unit="nats per byte and doubling of E",
        ),
        compare(
            "32 experts reach the dense twin's last validation loss in fewer steps than it took",
            "7.5 times as fast in steps with 64 experts (Switch, Figure 4)",
            speed_ups(results, 32), [1.0], unit="times as fast",
        ),
    ]  # fmt: skip


def slopes(results: Results) -> list[float]:
    """d loss / d log2 E of each seed, in nats per byte; infinite where a run diverged."""
    losses = np.array([results[side_name(E)].test_losses for E in EXPERTS])  # [E, seed]
    return [_slope(column) for column in losses.T]


def _slope(losses: np.ndarray) -> float:
    if not np.isfinite(losses).all():
        return math.inf
    return float(np.polyfit(np.log2(EXPERTS), losses, deg=1)[0])


def speed_ups(results: Results, num_experts: int) -> list[float]:
    """Steps of the dense twin over steps to its last validation loss, of each seed; 0 if never."""
    dense = results["dense"]
    pairs = zip(dense.runs, results[side_name(num_experts)].runs, strict=True)
    return [dense.config.steps / steps_to(_last_loss(twin), run) for twin, run in pairs]


def _last_loss(run: FinishedRun) -> float:
    """On the validation split."""
    return math.inf if run.diverged_at is not None else float(run.series("eval/loss")[1][-1])


def steps_to(target: float, run: FinishedRun) -> float:
    """Steps until the validation loss is at most the target; infinite if it never is.

    Between evaluations the loss is linear in log(step). A target that the first evaluation meets
    gives the first evaluation's step.
    """
    steps, losses = run.series("eval/loss")
    reached = np.flatnonzero(losses <= target)
    if not reached.size:
        return math.inf
    after = int(reached[0])
    if after == 0:
        return float(steps[0])
    before = after - 1
    way = (losses[before] - target) / (losses[before] - losses[after])
    return float(steps[before] * (steps[after] / steps[before]) ** way)


def table(results: Results) -> ResultTable:
    """A row for each number of experts, ours and the papers'."""
    columns = [
        "experts for each one visited",
        "test loss here (nats per byte)",
        "divided by the dense twin's",
        "step speed-up",
        *(f"{paper} (nats; divided by E = 1)" for paper in PUBLISHED),
    ]
    ratios = sorted(set(EXPERTS).union(*PUBLISHED.values()))
    return ResultTable(columns, [_row(results, ratio) for ratio in ratios])


def _row(results: Results, ratio: int) -> list[str]:
    ours = ["-", "-", "-"]
    if ratio in EXPERTS:
        side = results[side_name(ratio)]
        speed = "1" if ratio == 1 else describe(speed_ups(results, ratio))
        ours = [describe(side.test_losses), f"{relative_losses(results)[ratio]:.3f}", speed]
    papers = [
        f"{losses[ratio]:.3f} ({losses[ratio] / losses[1]:.3f})" if ratio in losses else "-"
        for losses in PUBLISHED.values()
    ]
    return [str(ratio), *ours, *papers]


def relative_losses(results: Results) -> dict[int, float]:
    """E -> mean test loss over that of the dense twin."""
    means = {E: float(np.mean(results[side_name(E)].test_losses)) for E in EXPERTS}
    return {E: mean / means[1] for E, mean in means.items()}


def draw(results: Results, figure: Figure) -> None:
    """Loss against E, the papers' beside it, loss against steps, and the step speed-up."""
    figure.set_size_inches(11, 7.6)
    (losses, papers), (curves, speed) = figure.subplots(2, 2)
    _draw_losses(losses, results)
    _draw_papers(papers, results)
    _draw_curves(curves, results)
    _draw_speed_ups(speed, results)


def _draw_losses(axes: Axes, results: Results) -> None:
    samples = [results[side_name(E)].test_losses for E in EXPERTS]
    means = [float(np.mean(sample)) for sample in samples]
    _scatter(axes, [1], samples[:1], DENSE, "dense twin, each seed")
    _scatter(axes, EXPERTS[1:], samples[1:], SPARSE, "MoE, each seed")
    axes.plot(EXPERTS, means, color=SPARSE, linewidth=1)
    axes.axhline(means[0], color=DENSE, linestyle=":", linewidth=1)
    slope = describe(slopes(results))
    axes.set(
        ylabel="test loss (nats per byte)",
        title=f"Loss against experts\nslope {slope} per doubling",
    )
    _number_of_experts(axes, EXPERTS, "experts E (1: dense)")
    axes.legend(fontsize=8)


def _scatter(
    axes: Axes, x: Sequence[int], samples: Sequence[Sequence[float]], color: str, label: str
) -> None:
    """A point for each seed."""
    for i, (place, sample) in enumerate(zip(x, samples, strict=True)):
        shown = label if i == 0 else None
        axes.plot([place] * len(sample), sample, "o", color=color, markersize=4, label=shown)


def _draw_papers(axes: Axes, results: Results) -> None:
    ours = relative_losses(results)
    axes.plot(list(ours), list(ours.values()), "o-", color=SPARSE, markersize=4, label="here")
    for paper, losses in PUBLISHED.items():
        color, marker = PAPER_STYLES[paper]
        relative = [loss / losses[1] for loss in losses.values()]
        axes.plot(list(losses), relative, f"{marker}--", color=color, markersize=4, label=paper)
    axes.axhline(1, color=NEUTRAL, linestyle=":", linewidth=1)
    axes.set(ylabel="loss / loss of the dense model", title="Beside the papers\n(means of seeds)")
    ratios = sorted(set(EXPERTS).union(*PUBLISHED.values()))
    _number_of_experts(axes, ratios, "experts for each one that a token visits")
    axes.legend(fontsize=8)


def _number_of_experts(axes: Axes, ticks: Sequence[int], label: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlabel(label)


def _draw_curves(axes: Axes, results: Results) -> None:
    colors = dict(zip(EXPERTS[1:], colormaps["viridis_r"](np.linspace(0.15, 1, 5)), strict=True))
    for E in EXPERTS:
        color = colors.get(E, DENSE)
        for i, run in enumerate(results[side_name(E)].runs):
            steps, losses = run.series("eval/loss")
            label = side_name(E) if i == 0 else None
            axes.plot(steps, losses, ".-", color=color, linewidth=0.9, label=label)
    axes.set(
        xlabel="step",
        ylabel="validation loss (nats per byte)",
        title="Loss against steps, each seed",
    )
    axes.legend(fontsize=8)


def _draw_speed_ups(axes: Axes, results: Results) -> None:
    samples = [speed_ups(results, E) for E in EXPERTS[1:]]
    places = range(len(samples))
    means = [float(np.mean(sample)) for sample in samples]
    axes.bar(places, means, color=SPARSE, alpha=0.4, width=0.6, label="mean")
    _scatter(axes, places, samples, SPARSE, "each seed")
    axes.axhline(1, color=DENSE, linestyle=":", linewidth=1, label="dense twin")
    axes.set_xticks(list(places), [str(E) for E in EXPERTS[1:]])
    axes.set(
        xlabel="experts E",
        ylabel="step speed-up",
        title="Dense twin's steps / steps to its last loss\n(Switch, 64 experts: 7.5)",
    )
    axes.legend(fontsize=8)


CLAIM = Claim(
    name="more_experts",
    title="More experts at the same FLOPs lower the loss",
    statement=STATEMENT.strip(),
    sides=sides,
    findings=findings,
    table=table,
    draw=draw,
)
