"""What the claims about stable training share: 32 experts, five seeds, and how they are drawn."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from experiments.claims import _text
from moe_jax.reproduction.results import SideResult

SEEDS = (0, 1, 2, 3, 4)
EXPERTS = {"model.num_experts": 32, "model.moe.router.gate_scale": _text.gate_scale(32)}
"""As many as in Switch's Tables 2 and 3."""

LARGEST_SHOWN = 8.0
"""Nats per byte; a loss above that of a uniform guess, 5.5, is that of a run out of control."""


def draw_training(
    axes: Axes, sides: Mapping[str, SideResult], colors: Mapping[str, str], title: str
) -> None:
    """Training loss of every seed over steps; a run that diverged ends early."""
    for name, side in sides.items():
        for i, run in enumerate(side.runs):
            steps, losses = run.series("train/loss")
            label = name if i == 0 else None
            axes.plot(steps, losses, color=colors[name], linewidth=0.8, alpha=0.7, label=label)
    _, top = axes.get_ylim()
    axes.set_ylim(top=min(top, LARGEST_SHOWN))
    axes.set(xlabel="step", ylabel="training loss (nats per byte)")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8)


def draw_samples(
    axes: Axes, samples: Mapping[str, Sequence[float]], colors: Mapping[str, str], label: str
) -> None:
    """A point for each seed, beside their mean with one standard deviation; how many others."""
    for place, (name, sample) in enumerate(samples.items()):
        finite = [value for value in sample if math.isfinite(value)]
        points = [place - 0.12] * len(finite)
        axes.plot(points, finite, "o", color=colors[name], alpha=0.5, markersize=4)
        if len(finite) > 1:
            mean, deviation = np.mean(finite), np.std(finite, ddof=1)
            draw_mean(axes, place + 0.12, float(mean), float(deviation), colors[name])
        if len(finite) < len(sample):
            axes.annotate(
                f"{len(sample) - len(finite)} of {len(sample)}\nnot finite", (place, 0.96),
                xycoords=("data", "axes fraction"), ha="center", va="top", fontsize=8,
            )  # fmt: skip
    axes.set_xticks(range(len(samples)), list(samples))
    axes.set_xlim(-0.5, len(samples) - 0.5)
    axes.set_ylabel(label)


def draw_mean(axes: Axes, place: float, mean: float, deviation: float, color: str) -> None:
    """A square with an error bar."""
    axes.errorbar(place, mean, deviation, fmt="s", color=color, markersize=5, capsize=4)
