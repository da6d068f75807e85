"""Pictures of runs, from the records in their metrics.jsonl."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Records = Sequence[Mapping[str, Any]]

# Color-blind safe (Okabe and Ito); one colour means one thing in every picture.
SPARSE, DENSE, NEUTRAL = "#0072B2", "#D55E00", "#666666"


def save_run_report(
    records: Records, moe_layers: Sequence[int | str], title: str, path: epath.PathLike
) -> None:
    """Draws one run: loss, dropped tokens, balance, and the load of each MoE layer over time."""
    figure = _figure(title, rows=1 + _heatmap_rows(moe_layers), columns=2)
    axes = figure.subplots(1 + _heatmap_rows(moe_layers), 2, squeeze=False).ravel()
    _draw_loss(axes[0], {"this run": records}, {"this run": SPARSE})
    axes[0].set_ylabel("loss")
    _draw_accuracy(axes[0], records)
    _draw_routing(axes[1], records, moe_layers)
    _draw_loads(list(axes[2:]), records, moe_layers)
    with epath.Path(path).open("wb") as file:  # The run's folder need not be on this machine.
        figure.savefig(file, dpi=120)


def save_comparison(
    sparse: Records,
    dense: Records,
    moe_layers: Sequence[int | str],
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


def _heatmap_rows(moe_layers: Sequence[int | str]) -> int:
    return (len(moe_layers) + 1) // 2


def _series(records: Records, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one metric, where it was recorded and finite."""
    found = [(r["step"], r[name]) for r in records if r.get(name) is not None]
    # Within a list, null is a number that was not finite.
    values = np.array([value for _, value in found], np.float64)
    return np.array([step for step, _ in found]), values


def _draw_loss(axes: Axes, runs: Mapping[str, Records], colors: Mapping[str, str]) -> None:
    for name, records in runs.items():
        color = colors[name]
        steps, losses = _series(records, "train/loss")
        axes.plot(steps, losses, color=color, linewidth=1, alpha=0.5, label=f"{name}, training")
        steps, losses = _series(records, "eval/loss")
        axes.plot(steps, losses, "o-", color=color, markersize=4, label=f"{name}, held out")
        if not len(steps):  # None was measured, or none was finite.
            continue
        axes.annotate(
            f"{losses[-1]:.3f}", (steps[-1], losses[-1]), color=color, fontsize=8,
            xytext=(5, 2 if color == DENSE else -8), textcoords="offset points",
        )  # fmt: skip
    axes.margins(x=0.1)  # Room for the last values.
    axes.set(xlabel="step", ylabel="loss (nats per byte)", title="Loss")
    axes.legend(fontsize=8)


def _draw_accuracy(loss_axes: Axes, records: Records) -> None:
    """Held-out accuracy on a right axis, where the task measures it."""
    steps, accuracies = _series(records, "eval/accuracy")
    if not len(steps):
        return
    axes = loss_axes.twinx()
    axes.plot(steps, 100 * accuracies, "s:", color=DENSE, markersize=3)
    axes.set_ylabel("held-out accuracy (%, dotted)", color=DENSE)


def _draw_routing(axes: Axes, records: Records, moe_layers: Sequence[int | str]) -> None:
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


def _draw_loads(axes: Sequence[Axes], records: Records, moe_layers: Sequence[int | str]) -> None:
    """One heat map per MoE layer: share of the tokens that each expert gets, over time."""
    for panel, layer in zip(axes, moe_layers, strict=False):
        steps, load = _series(records, f"router/{layer}/load")
        if not len(steps):
            panel.set(title=f"Load of block {layer}: none recorded")
            continue
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


# Of routing skews, apart from SPARSE and DENSE, which mean models; with a shift to the side (factor
# of the place), so that points do not cover each other.
_SKEWS = {"uniform": ("#009E73", 0.93), "zipf1.5": ("#CC79A7", 1.0), "one_hot": ("#E69F00", 1.075)}


def save_step_benchmark(rows: Records, title: str, path: epath.PathLike) -> None:
    """Draws tokens per second of training steps, one panel per decoder, one bar per program.

    Args:
      rows: of experiments/bench_layer.py --step.
      title: of the picture.
      path: PNG to write.
    """
    measured = [row for row in rows if "rounds" in row]
    decoders = list(dict.fromkeys((row["width"], row["experts"]) for row in measured))
    programs = list(dict.fromkeys(row["program"] for row in measured))
    figure = Figure(figsize=(3.2 * len(decoders), 3.4), layout="constrained")
    figure.suptitle(f"Training step, tokens per second, {title}")
    for panel, (width, experts) in zip(
        figure.subplots(1, len(decoders), squeeze=False)[0], decoders, strict=True
    ):
        own = [row for row in measured if (row["width"], row["experts"]) == (width, experts)]
        for row in own:
            color = f"C{programs.index(row['program'])}"
            bar = panel.bar(row["program"], row["tokens_per_second"], color=color)
            panel.bar_label(bar, fmt="{:,.0f}", fontsize=8)
        panel.set_title(
            f"width {width}, {f'{experts} experts' if experts else 'dense'}", fontsize=10
        )
        panel.set_xticks(
            range(len(own)), [row["program"].replace(" ", "\n") for row in own], fontsize=8
        )
        panel.set_yticks([])
        panel.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(str(path), dpi=120)


def save_layer_benchmark(rows: Records, title: str, path: epath.PathLike) -> None:
    """Draws what MoE layers cost relative to the balanced floor, one panel per variant.

    Variants that cost less than 4 times the floor share a linear axis and are drawn by assignments
    per expert. The others compute more experts than the tokens chose, so their cost goes by the
    number of experts; each has a logarithmic axis of its own.

    Args:
      rows: of experiments/bench_layer.py, of one mode; those of the two floors are drawn as lines.
      title: of the picture.
      path: PNG to write.
    """
    medians = {
        name: np.median([row["ratio_to_balanced"] for row in rows if row["variant"] == name])
        for name in dict.fromkeys(row["variant"] for row in rows)
    }
    layers = [name for name in medians if name not in ("dense", "balanced")]
    cheap = [row for row in rows if medians[row["variant"]] < 4]
    columns = min(4, len(layers))
    lines = -(-len(layers) // columns)
    figure = Figure(figsize=(3.4 * columns, 3.3 * lines + 0.8), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(lines, columns, squeeze=False)
    for panel in panels.ravel()[len(layers) :]:
        panel.set_visible(False)
    for panel, name in zip(panels.ravel(), layers, strict=False):
        if medians[name] < 4:
            _draw_variant(panel, rows, name, _rows_per_expert)
            top = 1.05 * max(row["ratio_to_balanced"] for row in cheap)
            panel.set(ylim=(0, top), xlabel="assignments per expert (N/E)")
        else:
            _draw_variant(panel, rows, name, _experts)
            panel.set(yscale="log", xlabel="experts (E); logarithmic cost")
            panel.yaxis.set_major_formatter("{x:g}")
            panel.tick_params(axis="y", which="minor", labelleft=False)
    for panel in panels[:, 0]:
        panel.set_ylabel("time / balanced floor")
    handles: dict[Any, Any] = {}  # By label: not every variant is measured with every routing.
    for panel in panels.flat:
        lines, labels = panel.get_legend_handles_labels()
        handles |= dict(zip(labels, lines, strict=True))
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=len(handles),
        frameon=False,
    )  # fmt: skip
    figure.savefig(str(path), dpi=120)


def _rows_per_expert(row: Mapping[str, Any]) -> float:
    return row["tokens"] * row["k"] / row["experts"]


def _experts(row: Mapping[str, Any]) -> float:
    return row["experts"]


def _draw_variant(
    panel: Axes, rows: Records, variant: str, place: Callable[[Mapping[str, Any]], float]
) -> None:
    """One point per shape and skew, a line through the medians, and both floors."""
    panel.axhline(1, color=NEUTRAL, linewidth=1.2, label="balanced floor")
    at, ratios = _places_and_ratios(rows, "dense", place)
    panel.plot(*_medians(at, ratios), "_--", color=DENSE, linewidth=1.2, label="dense floor")
    for skew, (color, shift) in _SKEWS.items():
        at, ratios = _places_and_ratios([r for r in rows if r["skew"] == skew], variant, place)
        if len(at):
            panel.plot(shift * at, ratios, "o", color=color, markersize=4, alpha=0.45, mew=0)
            panel.plot(*_medians(shift * at, ratios), "_-", color=color, ms=9, mew=2, label=skew)
    ticks = np.unique([place(row) for row in rows])
    ticks = ticks[:: 1 + len(ticks) // 8]
    panel.set_xscale("log", base=2)
    panel.set_xlim(ticks[0] / 1.6, 1.6 * ticks[-1])
    panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.minorticks_off()
    panel.set_title(variant)
    panel.grid(axis="y", alpha=0.3, linewidth=0.5)


def _places_and_ratios(
    rows: Records, variant: str, place: Callable[[Mapping[str, Any]], float]
) -> tuple[np.ndarray, np.ndarray]:
    own = [row for row in rows if row["variant"] == variant]
    return np.array([place(row) for row in own]), np.array([r["ratio_to_balanced"] for r in own])


def _medians(at: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different places, and the median of the values at each."""
    places = np.unique(at)
    return places, np.array([np.median(values[at == place]) for place in places])


COLLECTIVES = {
    "all-to-all": "#E69F00", "ragged-all-to-all": "#8C6100", "all-gather": "#56B4E9",
    "reduce-scatter": "#F0E442", "all-reduce": "#CC79A7", "collective-permute": "#000000",
    "collective-broadcast": "#BBBBBB",
}  # fmt: skip
# Forward, backward, and the time of both in collectives.
_PASSES = {"forward": "#009E73", "backward": "#8FD3C0", "collectives, waiting included": "#332288"}


def save_step_profile(
    results: Mapping[str, Mapping[str, float]],
    flops: Mapping[str, tuple[float, ...]],
    seconds: Mapping[str, tuple[float, ...]],
    unattributed: float,
    title: str,
    path: epath.PathLike,
) -> None:
    """Draws the collectives, matrix products and time of one training step on one device.

    Args:
      results: layer -> collective -> bytes of its results in a step.
      flops: part -> FLOPs in the forward and in the backward pass.
      seconds: the same parts -> time of the forward and of the backward pass without collectives,
        and in collectives.
      unattributed: seconds of the step in which no part worked.
      title: of the picture.
      path: PNG to write.
    """
    height = 0.27 * (len(seconds) + 3)
    figure = Figure(figsize=(11, 3.8 + height), layout="constrained")
    figure.suptitle(title)
    grid = figure.add_gridspec(2, 2, height_ratios=(3.1, height))
    _draw_collectives(figure.add_subplot(grid[0, :]), results)
    left = figure.add_subplot(grid[1, 0])
    right = figure.add_subplot(grid[1, 1], sharey=left)
    most = max((sum(values) for values in flops.values()), default=0)
    scale, unit = (1e9, "GFLOPs") if most > 1e9 else (1e6, "MFLOPs")
    _draw_passes(left, {**flops, "unattributed": (0, 0)}, scale)
    left.set(title="Matrix products by part", xlabel=f"{unit} in a step, on one device")
    left.invert_yaxis()
    _draw_passes(right, {**seconds, "unattributed": (0, 0, 0)}, 1e-3)
    right.barh("unattributed", 1e3 * unattributed, color=NEUTRAL)
    right.set(title="Time by part", xlabel="ms in a traced step, mean over devices")
    right.tick_params(labelleft=False)
    right.legend(fontsize=8)
    figure.savefig(str(path), dpi=120)


def _draw_collectives(axes: Axes, results: Mapping[str, Mapping[str, float]]) -> None:
    """One bar per layer, stacked by collective."""
    axes.set(ylabel="KiB in a step, on one device", title="Results of collectives, by layer")
    if not results:
        axes.text(0.5, 0.5, "no collectives", ha="center", transform=axes.transAxes)
        return
    layers, top = list(results), np.zeros(len(results))
    for collective, color in COLLECTIVES.items():
        heights = np.array([results[layer].get(collective, 0.0) for layer in layers]) / 1024
        if heights.any():
            axes.bar(layers, heights, bottom=top, color=color, label=collective, width=0.7)
        top += heights
    axes.tick_params(axis="x", rotation=90 if len(layers) > 12 else 0)
    axes.legend(fontsize=8)


def _draw_passes(axes: Axes, values: Mapping[str, tuple[float, ...]], unit: float) -> None:
    """One bar per part, the passes one after the other."""
    parts, left = [part.replace("_", " ") for part in values], np.zeros(len(values))
    for widths, (name, color) in zip(
        zip(*values.values(), strict=True), _PASSES.items(), strict=False
    ):
        axes.barh(parts, np.array(widths) / unit, left=left, color=color, label=name)
        left += np.array(widths) / unit
    axes.grid(axis="x", alpha=0.3, linewidth=0.5)
