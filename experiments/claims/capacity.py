"""Buffers that are too small cost quality (Switch, ST-MoE, MegaBlocks)."""

import functools
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.claims import _text
from moe_jax.analysis.figures import NEUTRAL, SPARSE
from moe_jax.reproduction.claim import TEST, Claim, Measurement, Profile, ResultTable, Side
from moe_jax.reproduction.measurements import test_split, with_changes
from moe_jax.reproduction.results import FinishedRun, Results
from moe_jax.reproduction.verdicts import Finding, compare, describe
from moe_jax.training.metrics import dropped_fraction
from moe_jax.training.observation import routing_statistics
from moe_jax.training.trained import Trained

FACTORS = (0.5, 0.75, 1.0, 1.25, 2.0)
"""Capacity factors, of training and of evaluation."""

TRAIN_FACTOR = "model.moe.capacity.train_factor"
EVALUATION_FACTOR = "model.moe.capacity.evaluation_factor"
PUBLISHED: Mapping[str, Mapping[float, float]] = {
    "Switch, Table 1": {1.0: 1.561, 1.25: 1.553, 2.0: 1.554},
    "ST-MoE, Tables 8 and 18": {0.75: 1.428, 1.0: 1.397, 1.25: 1.378},
}
"""Paper -> capacity factor of top-1 routing in training -> loss in nats per token."""

PAPER_STYLES = {
    "Switch, Table 1": ("#009E73", "s"),
    "ST-MoE, Tables 8 and 18": ("#CC79A7", "^"),
}

STATEMENT = """
ST-MoE says that larger buffers give better models: its top-1 models have a negative log perplexity
of -1.428 at a capacity factor of 0.75 (Table 18), -1.397 at 1.0 and -1.378 at 1.25 (Table 8), and a
model trained at 0.75 gains 0.020 to 0.024 when it is evaluated at 2.0. Switch draws the other
conclusion from smaller differences, -1.561, -1.553 and -1.554 at 1.0, 1.25 and 2.0 (Table 1): small
buffers cost little and are faster. MegaBlocks (Figure 2) finds the lowest loss where nothing is
dropped.

Here a Switch decoder is trained at factors of 0.5 to 2 and without drops; all else is the same, each
has its own learning rate, and each is evaluated at all factors. Losses are at the evaluation factor
2.0 unless another is named. The balancing loss is 0.001 (Switch and ST-MoE: 0.01), so that loads are
less even and small buffers drop more; router weights begin wider, and gates are multiplied by 4. The
papers' models are encoder-decoders, which predict spans; ours predict
the next byte, have 8 experts, and compute as much for a padded slot as for a token, so that a
larger factor also executes more FLOPs. Differences of 0.01 nats, such as Switch's, may be below what
three seeds resolve.
"""


def at_evaluation_factor(factor: float) -> Measurement:
    """`eval/loss` and so on, and `dropped`, on the test split at another capacity factor."""
    measure = functools.partial(test_split_at_factor, factor=factor)
    return Measurement(f"test at evaluation factor {factor:g}", measure)


def test_split_at_factor(trained: Trained, factor: float) -> dict[str, float]:
    """What the test split gives at an evaluation factor.

    Args:
      trained: the run; not dropless.
      factor: in place of the config's.

    Returns:
      `eval/...` and `dropped`, the mean over MoE layers of the share of choices without a slot.
    """
    changed = with_changes(trained, {EVALUATION_FACTOR: factor})
    batches = trained.run.config.evaluation.batches
    summaries = routing_statistics(changed, changed.open_data(), "test", batches)
    dropped = float(np.mean([summary["dropped"] for summary in summaries.values()]))
    return {**test_split(changed), "dropped": dropped}


def side_name(factor: float) -> str:
    """Of the side trained at a factor."""
    return f"factor {factor:g}"


def sides(profile: Profile) -> list[Side]:
    """A side for each factor of training, and one without drops."""
    measurements = (TEST, *map(at_evaluation_factor, FACTORS))
    limited = [
        _text.side(
            profile,
            side_name(factor),
            {**_text.LIMITED, TRAIN_FACTOR: factor},
            measurements=measurements,
        )
        for factor in FACTORS
    ]
    return [*limited, _text.side(profile, "dropless", {})]


def findings(results: Results) -> list[Finding]:
    """Small buffers in training and in evaluation, and none."""

    def higher(
        first: str, second: str, statement: str, paper: str, decisive: bool = True
    ) -> Finding:
        samples = (results[name].test_losses for name in (first, second))
        return compare(statement, paper, *samples, unit="nats per byte", decisive=decisive)

    gains = results[side_name(0.75)].sample(gain_of_evaluation_at_two)
    return [
        higher(
            side_name(0.5), side_name(1.25),
            "A capacity factor of 0.5 in training has a higher test loss than 1.25",
            "with batch priority 1.433 at 0.5 against 1.378 at 1.25 without (ST-MoE, Tables 18, 8)",
        ),
        higher(
            side_name(0.75), side_name(1.25),
            "A capacity factor of 0.75 in training has a higher test loss than 1.25",
            "1.428 against 1.378 (ST-MoE, Tables 18 and 8)",
        ),
        higher(
            side_name(1.0), side_name(1.25),
            "A capacity factor of 1.0 in training has a higher test loss than 1.25",
            "1.397 against 1.378 (ST-MoE, Table 8); 1.561 against 1.553 (Switch, Table 1)",
            decisive=False,  # The papers are divided about it.
        ),
        compare(
            "A model trained at 0.75 gains when it is evaluated at 2.0 and not at 0.75 (the same "
            "parameters, so the gain of each seed is compared with 0)",
            "a gain of 0.020 to 0.024 (ST-MoE)",
            gains, [0.0], unit="nats per byte",
        ),
        higher(
            side_name(1.0), "dropless",
            "A capacity factor of 1.0 in training has a higher test loss than dropless routing",
            "curves without printed figures (MegaBlocks, Figure 2)",
        ),
    ]  # fmt: skip


def loss_at(run: FinishedRun, factor: float) -> float:
    """Test loss at an evaluation factor; infinite if the run diverged."""
    if run.diverged_at is not None:
        return np.inf
    return run.measured[at_evaluation_factor(factor).name]["eval/loss"]


def gain_of_evaluation_at_two(run: FinishedRun) -> float:
    """Test loss at 0.75 less that at 2.0; a run that diverged gains nothing."""
    if run.diverged_at is not None:
        return 0.0
    return loss_at(run, 0.75) - loss_at(run, 2.0)


def training_drop_rate(run: FinishedRun) -> float:
    """Percent of choices without a slot, mean over MoE layers and the second half of the records."""
    rates = [dropped_fraction(record) for record in run.records if "train/loss" in record]
    return 100 * float(np.mean(rates[len(rates) // 2 :])) if rates else 0.0


def evaluation_drop_rate(run: FinishedRun, factor: float) -> float:
    """Percent of choices without a slot on the test split; all of them if the run diverged."""
    if run.diverged_at is not None:
        return 100.0
    return 100 * run.measured[at_evaluation_factor(factor).name]["dropped"]


def table(results: Results) -> ResultTable:
    """A row for each factor of training."""
    columns = [
        "factor in training",
        "dropped in training (%)",
        *(f"test loss (dropped), evaluated at {factor:g}" for factor in FACTORS),
        *(f"{paper} (nats per token)" for paper in PUBLISHED),
    ]
    dropless = results["dropless"]
    unread = ["-"] * (len(FACTORS) - 1)
    last = [
        "dropless",
        describe(dropless.sample(training_drop_rate)),
        *unread,
        describe(dropless.test_losses),
        *("-" for _ in PUBLISHED),
    ]
    return ResultTable(columns, [*(_row(results, factor) for factor in FACTORS), last])


def _row(results: Results, trained_at: float) -> list[str]:
    side = results[side_name(trained_at)]
    cells = []
    for factor in FACTORS:
        losses = [loss_at(run, factor) for run in side.runs]
        dropped = np.mean([evaluation_drop_rate(run, factor) for run in side.runs])
        cells.append(f"{describe(losses)} ({dropped:.1f}%)")
    papers = [
        f"{losses[trained_at]:.3f}" if trained_at in losses else "-"
        for losses in PUBLISHED.values()
    ]
    return [f"{trained_at:g}", describe(side.sample(training_drop_rate)), *cells, *papers]


def draw(results: Results, figure: Figure) -> None:
    """Loss and drop rate against the factor, all pairs of factors, and the papers' points."""
    figure.set_size_inches(11, 7.6)
    (losses, dropped), (evaluated, papers) = figure.subplots(2, 2)
    _draw_against_factor(losses, [results[side_name(f)].test_losses for f in FACTORS])
    for i, loss in enumerate(results["dropless"].test_losses):
        label = "dropless, each seed" if i == 0 else None
        losses.axhline(loss, color=NEUTRAL, linestyle="--", linewidth=1, label=label)
    losses.set(ylabel="test loss (nats per byte)", title="Loss, evaluated at a factor of 2")
    losses.legend(fontsize=8)
    rates = [results[side_name(f)].sample(training_drop_rate) for f in FACTORS]
    _draw_against_factor(dropped, rates)
    dropped.set(ylabel="dropped (% of choices)", title="Dropped in the second half of training")
    dropped.set_ylim(bottom=0)
    dropped.legend(fontsize=8)
    _draw_evaluated(evaluated, results)
    _draw_papers(papers, results)


def _draw_against_factor(axes: Axes, samples: Sequence[Sequence[float]]) -> None:
    """A point for each seed, and a line through the means."""
    for i, (factor, sample) in enumerate(zip(FACTORS, samples, strict=True)):
        label = "each seed" if i == 0 else None
        axes.plot([factor] * len(sample), sample, "o", color=SPARSE, markersize=4, label=label)
    axes.plot(FACTORS, [np.mean(sample) for sample in samples], color=SPARSE, linewidth=1)
    axes.set_xlabel("capacity factor in training")


def _draw_evaluated(axes: Axes, results: Results) -> None:
    for trained_at, color in zip(
        FACTORS, colormaps["viridis_r"](np.linspace(0.15, 1, 5)), strict=True
    ):
        for i, run in enumerate(results[side_name(trained_at)].runs):
            losses = [loss_at(run, factor) for factor in FACTORS]
            label = f"trained at {trained_at:g}" if i == 0 else None
            axes.plot(FACTORS, losses, ".-", color=color, linewidth=0.9, label=label)
    axes.set(
        xlabel="capacity factor in evaluation",
        ylabel="test loss (nats per byte)",
        title="Loss of the same parameters, each seed",
    )
    axes.legend(fontsize=8)


def _draw_papers(axes: Axes, results: Results) -> None:
    means = {f: float(np.mean(results[side_name(f)].test_losses)) for f in FACTORS}
    _draw_differences(axes, means, SPARSE, "o-", "here")
    for paper, losses in PUBLISHED.items():
        color, marker = PAPER_STYLES[paper]
        _draw_differences(axes, losses, color, f"{marker}--", paper)
    axes.axhline(0, color=NEUTRAL, linestyle=":", linewidth=1)
    axes.set(
        xlabel="capacity factor in training",
        ylabel="loss less that at 1.25 (nats)",
        title="Beside the papers (means of seeds)",
    )
    axes.legend(fontsize=8)


def _draw_differences(
    axes: Axes, losses: Mapping[float, float], color: str, style: str, label: str
) -> None:
    differences = [loss - losses[1.25] for loss in losses.values()]
    axes.plot(list(losses), differences, style, color=color, markersize=4, label=label)


CLAIM = Claim(
    name="capacity",
    title="Buffers that are too small cost quality",
    statement=STATEMENT.strip(),
    sides=sides,
    findings=findings,
    table=table,
    draw=draw,
)
