"""Pictures of runs, from the records in their metrics.jsonl."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Records = Sequence[Mapping[str, Any]]

# Color-blind safe (Okabe and Ito); one colour means one thing in every picture.
SPARSE, DENSE, NEUTRAL = "#0072B2", "#D55E00", "#666666"


def save_run_report(
    records: Records, moe_layers: Sequence[int], title: str, path: epath.PathLike
) -> None:
    """Draws one run: loss, dropped tokens, balance, and the load of each MoE layer over time."""
    figure = _figure(title, rows=1 + _heatmap_rows(moe_layers), columns=2)
    axes = figure.subplots(1 + _heatmap_rows(moe_layers), 2, squeeze=False).ravel()
    _draw_loss(axes[0], {"this run": records}, {"this run": SPARSE})
    _draw_routing(axes[1], records, moe_layers)
    _draw_loads(list(axes[2:]), records, moe_layers)
    figure.savefig(str(path), dpi=120)


def save_comparison(
    sparse: Records,
    dense: Records,
    moe_layers: Sequence[int],
    unigram_entropy: float,
    title: str,
    path: epath.PathLike,
) -> None:
    """Draws a MoE run beside its dense twin.

    Args:
      sparse, dense: records of the two runs.
      moe_layers: block index of each MoE layer of the sparse run.
      unigram_entropy: in nats per token, drawn as the level that no context gets below.
      title: of the picture.
      path: PNG to write.
    """
    rows = 1 + _heatmap_rows(moe_layers)
    figure = _figure(title, rows, columns=2)
    axes = figure.subplots(rows, 2, squeeze=False).ravel()
    _draw_loss(
        axes[0],
        {"MoE": sparse, "dense twin": dense},
        {"MoE": SPARSE, "dense twin": DENSE},
    )
    # The fall to the unigram entropy takes a few steps and is the same for both.
    axes[0].set_ylim(top=unigram_entropy + 0.15)
    axes[0].axhline(unigram_entropy, color=NEUTRAL, linestyle=":", linewidth=1)
    axes[0].text(
        sparse[-1]["step"], unigram_entropy, "unigram entropy", ha="right", va="bottom",
        color=NEUTRAL, fontsize=8,
    )  # fmt: skip
    _draw_routing(axes[1], sparse, moe_layers)
    _draw_loads(list(axes[2:]), sparse, moe_layers)
    figure.savefig(str(path), dpi=120)


def _figure(title: str, rows: float, columns: int) -> Figure:
    figure = Figure(figsize=(5.5 * columns, 3.6 * rows), layout="constrained")
    figure.suptitle(title)
    return figure


def _heatmap_rows(moe_layers: Sequence[int]) -> int:
    return (len(moe_layers) + 1) // 2


def _series(records: Records, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one metric, where it was recorded and finite."""
    found = [(r["step"], r[name]) for r in records if r.get(name) is not None]
    return np.array([step for step, _ in found]), np.array([value for _, value in found])


def _draw_loss(axes: Axes, runs: Mapping[str, Records], colors: Mapping[str, str]) -> None:
    for name, records in runs.items():
        color = colors[name]
        steps, losses = _series(records, "train/loss")
        axes.plot(steps, losses, color=color, linewidth=1, alpha=0.5, label=f"{name}, training")
        steps, losses = _series(records, "eval/loss")
        axes.plot(steps, losses, "o-", color=color, markersize=4, label=f"{name}, held out")
        axes.annotate(
            f"{losses[-1]:.3f}", (steps[-1], losses[-1]), color=color, fontsize=8,
            xytext=(5, 2 if color == DENSE else -8), textcoords="offset points",
        )  # fmt: skip
    axes.margins(x=0.1)  # Room for the last values.
    axes.set(xlabel="step", ylabel="loss (nats per byte)", title="Loss")
    axes.legend(fontsize=8)


def _draw_routing(axes: Axes, records: Records, moe_layers: Sequence[int]) -> None:
    """Dropped assignments (left axis) and max/mean load (right axis)."""
    axes.set(xlabel="step", title="Dropped tokens and balance")
    if not moe_layers:
        axes.text(0.5, 0.5, "a dense model routes nothing", ha="center", transform=axes.transAxes)
        return
    right = axes.twinx()
    for style, layer in zip(_line_styles(len(moe_layers)), moe_layers, strict=True):
        steps, dropped = _series(records, f"router/{layer}/dropped")
        if len(steps):  # Soft MoE drops nothing and has no such metric.
            axes.plot(steps, 100 * dropped, style, color=SPARSE, label=f"block {layer}, dropped")
        steps, uneven = _series(records, f"router/{layer}/max_over_mean_load")
        right.plot(steps, uneven, style, color=DENSE, label=f"block {layer}, max/mean load")
    axes.set_ylabel("dropped (% of assignments)", color=SPARSE)
    right.set_ylabel("max/mean load", color=DENSE)
    axes.set_ylim(bottom=0)
    right.set_ylim(bottom=1)
    lines = [*axes.get_lines(), *right.get_lines()]
    axes.legend(lines, [str(line.get_label()) for line in lines], fontsize=8)


def _line_styles(count: int) -> list[str]:
    return [("-", "--", ":", "-.")[i % 4] for i in range(count)]


def _draw_loads(axes: Sequence[Axes], records: Records, moe_layers: Sequence[int]) -> None:
    """One heat map per MoE layer: share of the tokens that each expert gets, over time."""
    for panel, layer in zip(axes, moe_layers, strict=False):
        steps, load = _series(records, f"router/{layer}/load")
        load = load.T
        share = load / load.sum(axis=0, keepdims=True)
        fair = 100 / len(share)
        image = panel.pcolormesh(
            steps, np.arange(len(share)), 100 * share, shading="nearest", cmap="viridis",
            vmin=0, vmax=3 * fair,
        )  # fmt: skip
        bar = panel.figure.colorbar(
            image, ax=panel, extend="max", ticks=[0, fair, 2 * fair, 3 * fair]
        )
        bar.set_label("share of tokens (%)")
        panel.set(
            xlabel="step", ylabel="expert", title=f"Expert load, block {layer}",
            yticks=np.linspace(0, len(share) - 1, min(len(share), 8)).round(),
        )  # fmt: skip
    for panel in axes[len(moe_layers) :]:
        panel.set_visible(False)


def save_side_by_side(
    curves: Mapping[str, Sequence[Records]],
    tests: Mapping[str, Sequence[Mapping[str, float]]],
    title: str,
    path: epath.PathLike,
) -> None:
    """Draws two sides over seeds: validation loss by step, and the test gap of each domain.

    Args:
      curves: "moe" and "dense" -> records of one run per seed.
      tests: "moe" and "dense" -> per seed, `eval/loss` and `eval/loss/<domain>`.
      title: of the picture.
      path: PNG to write.
    """
    figure = _figure(title, rows=1.3, columns=2)
    left, right = figure.subplots(1, 2)
    for side, color in (("moe", SPARSE), ("dense", DENSE)):
        for seed, records in enumerate(curves[side]):
            left.plot(
                *_series(records, "eval/loss"), "o-", color=color, linewidth=1, markersize=3,
                label={"moe": "MoE", "dense": "dense twin"}[side] if seed == 0 else None,
            )  # fmt: skip
    left.set(xlabel="step", ylabel="validation loss (nats per byte)", title="One line per seed")
    left.legend()
    domains = sorted(name for name in tests["moe"][0] if name.startswith("eval/loss/"))
    losses = {side: np.array([[t[d] for d in domains] for t in tests[side]]) for side in tests}
    gap = losses["dense"].mean(axis=0) - losses["moe"].mean(axis=0)
    error = np.sqrt(sum(values.var(axis=0, ddof=1) / len(values) for values in losses.values()))
    order = np.argsort(gap)
    names = [domains[i].removeprefix("eval/loss/") for i in order]
    right.barh(names, gap[order], xerr=2 * error[order], color=SPARSE, ecolor=NEUTRAL)
    right.axvline(0, color=NEUTRAL, linewidth=1)
    right.set(
        xlabel="dense - MoE test loss (nats per byte), bars of 2 standard errors",
        title="Where the experts help",
    )
    figure.savefig(str(path), dpi=120)
