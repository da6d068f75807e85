"""Serving confident tokens first helps where buffers are small (ST-MoE, V-MoE)."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.claims import _text
from experiments.claims.capacity import (
    EVALUATION_FACTOR,
    TRAIN_FACTOR,
    at_evaluation_factor,
    loss_at,
    training_drop_rate,
)
from moe_jax.analysis.figures import DENSE, NEUTRAL, SPARSE
from moe_jax.reproduction.claim import TEST, Claim, Profile, ResultTable, Side
from moe_jax.reproduction.results import FinishedRun, Results
from moe_jax.reproduction.verdicts import Finding, compare, describe
from moe_jax.routing.priority import Priority
from moe_jax.tasks.masked_language_modeling import MaskedLanguageModeling

SMALL, LARGE = 0.5, 1.25
"""Capacity factors, in training and evaluation alike."""

STEPS = {Profile.CPU: 600, Profile.GPU: 4000}

ORDERS = {
    Priority.TOKEN: "left to right",
    Priority.BATCH_PRIORITY: "batch priority",
    Priority.ASSIGNMENT_PRIORITY: "assignment priority",
}
COLORS = dict(zip(ORDERS, (DENSE, SPARSE, "#009E73"), strict=True))

CASES = (
    *((order, factor, 1) for factor in (SMALL, LARGE) for order in list(ORDERS)[:2]),
    *((order, SMALL, 2) for order in ORDERS),
)
"""Order, capacity factor and k of each side; with top-1 both priorities are the same."""

PUBLISHED: Mapping[Priority, Mapping[float, float]] = {
    Priority.TOKEN: {0.75: 1.428, 1.0: 1.397, 1.25: 1.378},
    Priority.BATCH_PRIORITY: {0.5: 1.433, 0.75: 1.409, 1.0: 1.386},
}
"""Order -> capacity factor of top-1 routing -> loss in nats per token (ST-MoE, Tables 8 and 18)."""

STATEMENT = """
Batch Prioritized Routing (V-MoE) serves tokens in descending order of their largest gate, so that the
tokens left out of full buffers are those that the router is least sure of. ST-MoE (Table 18) prints,
for top-1 routing in its encoder, negative log perplexities of -1.433 at a capacity factor of 0.5,
-1.409 at 0.75 (-1.428 without priority) and -1.386 at 1.0 (-1.397 without), and no gain at 1.25.
Assignment-level priority orders single (token, expert) pairs instead (asked about in
google-research/vmoe, issue 49); no paper prints a figure of it.

Priority lets later tokens decide about earlier ones, so it is tested on an objective that may look
ahead: a bidirectional model predicts the 30% of the bytes that are masked. All of them, and the other
bytes, compete for the same slots; training and evaluation have the same factor. With top-1 both
priorities are the same order, so assignment-level priority is tested with top-2, where gates are
multiplied by half as much. ST-MoE's model is an encoder-decoder that predicts spans and has no
priority in its decoder; ours has 8 experts and runs short.
"""


def side_name(order: Priority, factor: float, k: int = 1) -> str:
    """Name of the side with a priority order, a capacity factor and top-k."""
    return f"top-{k} at {factor:g}, {ORDERS[order]}"


def sides(profile: Profile) -> list[Side]:
    """See `CASES`."""
    return [_side(profile, *case) for case in CASES]


def _side(profile: Profile, order: Priority, factor: float, k: int) -> Side:
    changes = {
        "steps": STEPS[profile],
        # Twice BERT's rate, for twice as many predictions in a step.
        "task": MaskedLanguageModeling(mask_rate=0.3),
        "model.bidirectional": True,
        **_text.LIMITED,
        "model.moe.router.k": k,
        "model.moe.router.gate_scale": _text.gate_scale(8) / k,
        "model.moe.router.order": order,
        TRAIN_FACTOR: factor,
        EVALUATION_FACTOR: factor,
    }
    return _text.side(
        profile,
        side_name(order, factor, k),
        changes,
        measurements=(TEST, at_evaluation_factor(2.0)),
    )


def findings(results: Results) -> list[Finding]:
    """Of priority over left to right where buffers are small, and that large ones need none."""

    def lower(
        order: Priority, k: int, statement: str, paper: str, decisive: bool = True
    ) -> Finding:
        first, second = (
            results[side_name(each, SMALL, k)].test_losses for each in (Priority.TOKEN, order)
        )
        return compare(
            statement, paper, first, second, unit="nats per masked byte", decisive=decisive
        )

    return [
        lower(
            Priority.BATCH_PRIORITY, 1,
            "Top-1 at a capacity factor of 0.5: batch priority has a lower loss than left to right",
            "1.433 at 0.5 with priority, as good as 1.428 at 0.75 without, where priority has 1.409 "
            "(ST-MoE, Table 18)",
        ),
        compare(
            "Top-1: batch priority gains more at a capacity factor of 0.5 than at 1.25",
            "a gain of 0.019 at 0.75, 0.011 at 1.0 and none at 1.25 (ST-MoE, Table 18)",
            gains(results, SMALL), gains(results, LARGE), unit="nats per masked byte",
        ),
        lower(
            Priority.ASSIGNMENT_PRIORITY, 2,
            "Top-2 at a capacity factor of 0.5: assignment-level priority has a lower loss than left "
            "to right",
            "no figure is published",
            decisive=False,
        ),
    ]  # fmt: skip


def gains(results: Results, factor: float) -> list[float]:
    """Loss of left to right less that of batch priority at top-1, of each seed.

    The seeds of the two have the same data in the same order. Pairs with a run that diverged are left
    out, unless that is all of them: then the gain is 0.
    """
    pairs = zip(
        results[side_name(Priority.TOKEN, factor)].test_losses,
        results[side_name(Priority.BATCH_PRIORITY, factor)].test_losses,
        strict=True,
    )
    return [first - second for first, second in pairs if np.isfinite([first, second]).all()] or [
        0.0
    ]


def table(results: Results) -> ResultTable:
    """A row for each side, with the paper's loss where it has one."""
    columns = [
        "side",
        "dropped in training (%)",
        "test loss (nats per masked byte)",
        "evaluated at a factor of 2",
        "ST-MoE, Tables 8 and 18 (nats per token)",
    ]
    return ResultTable(columns, [_row(results, *case) for case in CASES])


def _row(results: Results, order: Priority, factor: float, k: int) -> list[str]:
    name = side_name(order, factor, k)
    side = results[name]
    published = PUBLISHED.get(order, {}).get(factor) if k == 1 else None
    return [
        name,
        describe(side.sample(training_drop_rate)),
        describe(side.test_losses),
        describe(side.sample(_at_two)),
        "-" if published is None else f"{published:.3f}",
    ]


def _at_two(run: FinishedRun) -> float:
    return loss_at(run, 2.0)


def draw(results: Results, figure: Figure) -> None:
    """Loss against the factor for top-1, the orders of top-2, and the paper's points."""
    figure.set_size_inches(11, 4)
    top_1, top_2, paper = figure.subplots(1, 3)
    for order in (Priority.TOKEN, Priority.BATCH_PRIORITY):
        samples = [results[side_name(order, f)].test_losses for f in (SMALL, LARGE)]
        _draw_seeds(top_1, (SMALL, LARGE), samples, order)
    top_1.set(
        xlabel="capacity factor",
        xticks=(SMALL, LARGE),
        ylabel="test loss (nats per masked byte)",
        title="Top-1, each seed and means",
    )
    top_1.legend(fontsize=8)
    for place, order in enumerate(ORDERS):
        _draw_seeds(top_2, [place], [results[side_name(order, SMALL, 2)].test_losses], order)
    labels = [label.replace(" priority", "\npriority") for label in ORDERS.values()]
    top_2.set_xticks(range(len(ORDERS)), labels)
    top_2.margins(x=0.2)
    top_2.set(
        ylabel="test loss (nats per masked byte)",
        title=f"Top-2 at a factor of {SMALL:g}, each seed",
    )
    for order, losses in PUBLISHED.items():
        style = {"color": COLORS[order], "markersize": 4, "label": ORDERS[order]}
        paper.plot(list(losses), list(losses.values()), "s--", **style)
    paper.axhline(PUBLISHED[Priority.TOKEN][LARGE], color=NEUTRAL, linestyle=":", linewidth=1)
    paper.set(
        xlabel="capacity factor",
        ylabel="loss (nats per token)",
        title="ST-MoE, top-1 (Tables 8 and 18)",
    )
    paper.legend(fontsize=8)


def _draw_seeds(
    axes: Axes, x: Sequence[float], samples: Sequence[Sequence[float]], order: Priority
) -> None:
    """A point for each seed, and a line through the means."""
    color = COLORS[order]
    for place, sample in zip(x, samples, strict=True):
        axes.plot([place] * len(sample), sample, "o", color=color, markersize=4)
    means = [np.mean(sample) for sample in samples]
    axes.plot(x, means, "_-", color=color, markersize=16, linewidth=1, label=ORDERS[order])


CLAIM = Claim(
    name="priority",
    title="Serving confident tokens first helps where buffers are small",
    statement=STATEMENT.strip(),
    sides=sides,
    findings=findings,
    table=table,
    draw=draw,
)
