"""Pictures of training steps on machines of many devices, from the reports of `moe_jax.pods`.

A report is what `PodReport.as_json` gives, read as a mapping.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from moe_jax.analysis.figures import COLLECTIVES, DENSE, NEUTRAL, SPARSE

Reports = Sequence[Mapping[str, Any]]

_GIB = 2**30
# The terms of a roofline, in the order in which they are stacked.
_TERMS = {
    "compute": "#009E73", "memory": "#F0E442", "interconnect": "#0072B2", "network": "#D55E00"
}  # fmt: skip
_MEMORY = {"parameters": SPARSE, "optimizer_state": "#56B4E9", "temporaries": "#E69F00"}


def save_scaling(reports: Reports, title: str, path: epath.PathLike) -> None:
    """Draws one model on more and more devices.

    Four panels: HBM of a device, with hollow marks where the step does not fit; results of
    collectives by kind; the terms of the roofline as the time of all devices for a token, which is
    level where scaling is perfect; and MFU with and without overlap.

    Args:
      reports: of the same model, by devices; one at least.
      title: of the picture.
      path: PNG to write.
    """
    figure = Figure(figsize=(11, 7.6), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(2, 2).ravel()
    fitting = [report for report in reports if report["roofline"]]
    _draw_memory(panels[0], reports)
    _draw_collectives(panels[1], fitting)
    _draw_terms(panels[2], fitting)
    _draw_efficiency(panels[3], fitting)
    for panel in panels:
        _mark_devices(panel, [report["devices"] for report in reports])
    _save(figure, path)


def _save(figure: Figure, path: epath.PathLike) -> None:
    with epath.Path(path).open("wb") as file:
        figure.savefig(file, dpi=120)


def _mark_devices(axes: Axes, devices: Sequence[int]) -> None:
    """The same devices on each panel, also where some are missing."""
    axes.set_xscale("log", base=2)
    axes.set_xlabel("devices")
    axes.set_xticks(devices, [f"{number:,}" for number in devices])
    axes.minorticks_off()
    axes.grid(axis="y", alpha=0.3, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.set_xlim(devices[0] / 1.5, devices[-1] * 1.5)


def _draw_memory(axes: Axes, reports: Reports) -> None:
    axes.set(title="Memory of a device", ylabel="GiB (logarithmic)", yscale="log")
    devices = np.array([report["devices"] for report in reports])
    fits = np.array([report["fits"] for report in reports], bool)
    lines = {
        "all that the step needs": ("#000000", [report["hbm_bytes"] for report in reports]),
        **{
            name: (_MEMORY[name], [report["hbm"][name] for report in reports])
            for name in ("parameters", "optimizer_state")
        },
    }
    for name, (color, values) in lines.items():
        heights = np.array(values) / _GIB
        axes.plot(devices, heights, color=color, linewidth=1, label=name.replace("_", " "))
        axes.plot(devices[fits], heights[fits], "o", color=color, ms=5)
        axes.plot(devices[~fits], heights[~fits], "o", color=color, mfc="white", ms=5)
    limit = reports[0]["hbm_capacity_bytes"] / _GIB
    axes.axhline(limit, color=DENSE, linestyle="--", linewidth=1, label="limit")
    if not fits.all():
        axes.plot([], [], "o", color=NEUTRAL, mfc="white", label="does not fit")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend(fontsize=8)


def _draw_collectives(axes: Axes, fitting: Reports) -> None:
    axes.set(title="Results of collectives", ylabel="GiB in a step, on one device (logarithmic)")
    devices = np.array([report["devices"] for report in fitting])
    for kind, color in COLLECTIVES.items():
        heights = np.array([_bytes_of(report, kind) for report in fitting]) / _GIB
        sent = heights > 0
        if sent.any():
            axes.plot(devices[sent], heights[sent], "o-", color=color, lw=1.2, ms=4, label=kind)
            axes.set_yscale("log")
            axes.legend(fontsize=8)
    bottom, top = axes.get_ylim()
    if fitting and top < 100 * bottom:  # Powers of ten alone could be no mark at all.
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")


def _bytes_of(report: Mapping[str, Any], kind: str) -> float:
    return sum(one["bytes"] for one in report["collectives"] if one["kind"] == kind)


def _draw_terms(axes: Axes, fitting: Reports) -> None:
    axes.set(title="Roofline: terms, and the longest of them")
    if not fitting:
        axes.text(0.5, 0.5, "none fits", ha="center", transform=axes.transAxes)
        return
    devices = np.array([report["devices"] for report in fitting], float)
    per_token = 1e6 * devices / [report["tokens_per_step"] for report in fitting]
    bottom = np.zeros(len(fitting))
    for name, color in _TERMS.items():
        heights = per_token * [report["roofline"][name] for report in fitting]
        if heights.any():
            axes.bar(devices, heights, 0.5 * devices, bottom=bottom, color=color, label=name)
        bottom += heights
    longest = per_token * [report["roofline"]["step_seconds"] for report in fitting]
    axes.plot(devices, longest, "_", color="#000000", ms=22, mew=2, label="longest")
    axes.set_ylabel(f"µs of all devices for {_article(fitting[0]['unit'])}")
    axes.legend(fontsize=8)


def _article(unit: str) -> str:
    return f"{'an' if unit[0] in 'aeiou' else 'a'} {unit}"


def _draw_efficiency(axes: Axes, fitting: Reports) -> None:
    axes.set(title="Roofline efficiency", ylabel="MFU (%)", ylim=(0, 100))
    devices = [report["devices"] for report in fitting]
    for key, name, style in (
        ("mfu", "everything overlaps", "o-"),
        ("mfu_without_overlap", "nothing overlaps", "o--"),
    ):
        values = [100 * report["roofline"][key] for report in fitting]
        axes.plot(devices, values, style, color=SPARSE, lw=1.2, ms=4, label=name)
    axes.legend(fontsize=8)


def save_budgets(reports: Reports, title: str, path: epath.PathLike) -> None:
    """Draws published models on their machines: the use of memory, and the terms of the roofline.

    Args:
      reports: one for each model, in the order of the bars.
      title: of the picture.
      path: PNG to write.
    """
    figure = Figure(figsize=(11, 1.7 + 0.42 * len(reports)), layout="constrained")
    figure.suptitle(title)
    left, right = figure.subplots(1, 2, sharey=True)
    names = [f"{_model(report['config'])}\n{report['hardware']}" for report in reports]
    _stack(left, names, reports, _MEMORY, _share_of_memory)
    left.axvline(100, color=DENSE, linestyle="--", linewidth=1)
    left.set(title="Memory of a device", xlabel="% of what the compiler lets a program use")
    _stack(right, names, reports, _TERMS, _share_of_step)
    right.axvline(100, color=NEUTRAL, linestyle="--", linewidth=1)
    for row, report in enumerate(reports):
        if terms := report["roofline"]:
            total = sum(_share_of_step(report, name) for name in _TERMS)
            right.text(total, row, f" MFU {terms['mfu']:.0%}", va="center", fontsize=8)
    right.set_xlim(0, 1.25 * right.get_xlim()[1])  # Room for the last words.
    right.set(title="Terms of the roofline, one after the other", xlabel="% of the longest")
    left.invert_yaxis()
    left.tick_params(axis="y", labelsize=8)
    for panel in (left, right):
        panel.grid(axis="x", alpha=0.3, linewidth=0.5)
        panel.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=4)
    _save(figure, path)


def _model(config: str) -> str:
    """configs/glam.py:64b_64e -> glam/64b_64e."""
    return config.removeprefix("configs/").removesuffix(".py").replace(".py:", "/")


def _share_of_memory(report: Mapping[str, Any], name: str) -> float:
    """Percent; temporaries of a step that was refused may be unknown."""
    return 100 * (report["hbm"][name] or 0) / report["hbm_capacity_bytes"]


def _share_of_step(report: Mapping[str, Any], name: str) -> float:
    """Percent of the roofline; 0 where the step does not fit."""
    terms = report["roofline"]
    return 100 * terms[name] / terms["step_seconds"] if terms else 0.0


def _stack(
    axes: Axes,
    names: Sequence[str],
    reports: Reports,
    colors: Mapping[str, str],
    share: Callable[[Mapping[str, Any], str], float],
) -> None:
    """A bar for each report, its parts one after the other."""
    left = np.zeros(len(reports))
    for name, color in colors.items():
        widths = np.array([share(report, name) for report in reports])
        label = name.replace("_", " ")
        axes.barh(range(len(reports)), widths, left=left, color=color, label=label, height=0.7)
        left += widths
    axes.set_yticks(range(len(reports)), names)
