"""The routing of an evaluation as one picture and one JSON file, from `study.summarize`."""

import json
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from etils import epath
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from moe_jax.analysis.figures import NEUTRAL, SPARSE
from moe_jax.errors import UserError
from moe_jax.routing.study import Summary

Summaries = Mapping[int | str, Summary]

LAYERS_SHOWN = 4
POINTS = 64  # At most, in a line over positions: single positions of a small evaluation are noise.


def write_json(numbers: Summaries, labels: Sequence[str], path: epath.PathLike) -> None:
    """Writes every number of every MoE layer.

    Args:
      numbers: name of the layer -> summary.
      labels: [D] names of the rows of `by_label`.
      path: gets {"labels": [...], "blocks": {"1": {"load": [...], ...}, ...}}.
    """
    blocks = {str(block): summary for block, summary in numbers.items()}
    text = json.dumps({"labels": list(labels), "blocks": blocks}, allow_nan=False)
    epath.Path(path).write_text(text + "\n")


def save(numbers: Summaries, labels: Sequence[str], title: str, path: epath.PathLike) -> None:
    """Draws one row of panels per MoE layer; of more than four, the first, middle and last.

    Args:
      numbers: name of the layer -> summary, in the model's order. What a summary lacks (drops of Soft MoE) is not drawn.
      labels: [D] names of the rows of `by_label`.
      title: of the picture.
      path: PNG to write.

    Raises:
      UserError: there is no MoE layer.
    """
    if not numbers:
        raise UserError(
            "The model has 0 MoE layers, so there is no routing to draw; use a MoE run."
        )
    shown = _shown(list(numbers))
    panels = [
        (draw, needs)
        for needs, draw in _panels(labels).items()
        if any(needs in numbers[block] for block in shown)
    ]
    figure = Figure(figsize=(4.6 * len(panels), 3.5 * len(shown) + 0.4), layout="constrained")
    if len(shown) < len(numbers):
        title = f"{title} ({len(shown)} of {len(numbers)} MoE layers)"
    figure.suptitle(title, fontsize=14)
    grid = figure.subplots(len(shown), len(panels), squeeze=False)
    for row, block in zip(grid, shown, strict=True):
        for axes, (draw, needs) in zip(row, panels, strict=True):
            if needs in numbers[block]:
                draw(axes, block, numbers[block])
            else:
                axes.set_visible(False)
    figure.savefig(str(path), dpi=100)


def _shown(blocks: Sequence[int | str]) -> list[int | str]:
    if len(blocks) <= LAYERS_SHOWN:
        return list(blocks)
    return [blocks[0], blocks[len(blocks) // 2], blocks[-1]]


def _panels(labels: Sequence[str]) -> dict[str, Callable[[Axes, int | str, Summary], None]]:
    """What a summary must have -> what draws it, in the order of the columns."""
    return {
        "load": _draw_load,
        "dropped_by_position": _draw_drops,
        "experts_per_token": _draw_gates_or_experts,
        "by_label": lambda axes, block, summary: _draw_labels(axes, block, summary, labels),
        "coactivation": _draw_coactivation,
    }


def _draw_load(axes: Axes, block: int | str, summary: Summary) -> None:
    load, importance = _array(summary, "load"), _array(summary, "importance")
    experts = np.arange(len(load))
    axes.bar(experts, 100 * load / max(load.sum(), 1e-9), color=SPARSE, label="choices")
    axes.plot(experts, 100 * importance, "_", color="black", mew=1.5, label="router probability")
    axes.axhline(100 / len(load), color=NEUTRAL, linestyle=":", label="fair share")
    axes.set(xlabel="expert", ylabel="share (%)", xticks=_ticks(len(load)))
    axes.set_title(_load_title(block, summary), fontsize=10)
    axes.margins(y=0.3)  # Room for the legend.
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, ncols=3, loc="upper center", columnspacing=1, handlelength=1.2)


def _load_title(block: int | str, summary: Summary) -> str:
    title = (
        f"Block {block}: load, CV {summary['load_cv']:.2f}, "
        f"MaxVio {summary['max_violation_global']:.2f}, {summary['dead_experts']:.0f} dead"
    )
    if "largest_dispatch" not in summary:
        return title
    return (
        f"{title}\nmean largest weights: dispatch {summary['largest_dispatch']:.2f}, "
        f"combine {summary['largest_combine']:.2f}"
    )


def _draw_drops(axes: Axes, block: int | str, summary: Summary) -> None:
    wanted = _array(summary, "wanted_by_position")
    dropped = wanted * _array(summary, "dropped_by_position")
    windows = np.array_split(np.arange(len(wanted)), min(len(wanted), POINTS))
    seen = [window for window in windows if wanted[window].sum() > 0]
    rates = [100 * dropped[window].sum() / wanted[window].sum() for window in seen]
    axes.plot([window.mean() for window in seen], rates, color=SPARSE)
    mean = 100 * float(_array(summary, "dropped"))
    axes.axhline(mean, color=NEUTRAL, linestyle=":", label="mean")
    axes.set(
        xlabel="position in the sequence", ylabel="dropped (%)", xlim=(0, max(len(wanted) - 1, 1)),
        ylim=(0, max(1.15 * max(rates, default=0), 1)),
        title=f"Block {block}: {_percent(summary, 'dropped')} dropped",
    )  # fmt: skip
    axes.title.set_fontsize(10)
    axes.legend(fontsize=8)


def _draw_gates_or_experts(axes: Axes, block: int | str, summary: Summary) -> None:
    """Gates by rank, or where experts choose and gates have no rank, how many take a token."""
    axes.set_title(
        f"Block {block}: next token repeats the first expert {_percent(summary, 'repeat_first')}",
        fontsize=10,
    )
    if "gates" not in summary:
        shares = np.trim_zeros(_array(summary, "experts_per_token"), "b")
        axes.bar(np.arange(len(shares)), 100 * shares, color=SPARSE)
        axes.set(xlabel="experts of a token", ylabel="tokens (%)", xticks=_ticks(len(shares)))
        return
    gates = _array(summary, "gates")
    edges = np.linspace(0, float(_array(summary, "largest_gate")), gates.shape[1] + 1)
    colors = colormaps["viridis"](np.linspace(0, 0.9, len(gates)))
    for rank, (shares, color) in enumerate(zip(gates, colors, strict=True), start=1):
        axes.stairs(100 * shares, edges, color=color, linewidth=1.5, label=f"choice {rank}")
    axes.set(xlabel="gate", ylabel="gates of the rank (%)")
    axes.set_xlim(0, edges[len(np.trim_zeros(gates.sum(axis=0), "b"))] or edges[-1])
    axes.legend(fontsize=8)


def _draw_labels(axes: Axes, block: int | str, summary: Summary, labels: Sequence[str]) -> None:
    table = _array(summary, "by_label")
    fair = 100 / table.shape[1]
    image = axes.imshow(
        100 * table, aspect="auto", cmap="viridis", vmin=0, vmax=3 * fair, interpolation="nearest"
    )
    _colorbar(axes, image, "share of the label's choices (%)", fair)
    axes.set(xlabel="expert", xticks=_ticks(table.shape[1]), yticks=np.arange(len(labels)))
    axes.set_yticklabels(labels, fontsize=8 if len(labels) <= 16 else 6)
    axes.set_title(
        f"Block {block}: experts by label, {summary['label_information']:.3f} nats", fontsize=10
    )


def _draw_coactivation(axes: Axes, block: int | str, summary: Summary) -> None:
    table = 100 * _array(summary, "coactivation")
    np.fill_diagonal(table, np.nan)  # An expert is always chosen along with itself.
    axes.set_facecolor("0.85")  # Seen where there is no number.
    image = axes.imshow(table, aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
    _colorbar(axes, image, "tokens of i that also have j (%)")
    ticks = _ticks(len(table))
    axes.set(xlabel="expert j", ylabel="expert i", xticks=ticks, yticks=ticks)
    axes.set_title(
        f"Block {block}: next token shares an expert {_percent(summary, 'repeat_any')}", fontsize=10
    )


def _array(summary: Summary, name: str) -> np.ndarray:
    return np.array(summary[name], np.float64)


def _percent(summary: Summary, name: str) -> str:
    return f"{100 * _array(summary, name):.1f}%"


def _ticks(count: int) -> np.ndarray:
    """Evenly spaced whole numbers from 0, at most eight and below the count."""
    return np.arange(0, count, -(-count // 8))


def _colorbar(axes: Axes, image: AxesImage, label: str, fair: float | None = None) -> None:
    """With a fair share, from 0 to three times that."""
    ticks = None if fair is None else [0, fair, 2 * fair, 3 * fair]
    extend = "neither" if fair is None else "max"
    bar = axes.figure.colorbar(image, ax=axes, extend=extend, ticks=ticks, format="%.3g")
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=8)
