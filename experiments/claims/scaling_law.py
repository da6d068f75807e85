"""The scaling law of routed models, refitted from the data of its authors (Clark et al., 2022)."""

import collections
import csv
import dataclasses
import functools
import gzip
import hashlib
import io
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from absl import flags
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.claims import more_experts
from moe_jax.analysis.figures import NEUTRAL, SPARSE
from moe_jax.analysis.scaling_law import (
    Law,
    Models,
    bootstrap,
    fit_bilinear,
    fit_saturating,
    slope,
)
from moe_jax.errors import UserError
from moe_jax.reproduction.claim import Claim, ResultTable
from moe_jax.reproduction.results import Results
from moe_jax.reproduction.verdicts import Finding, Verdict, agree, compare, overall

URL = (
    "https://raw.githubusercontent.com/google-deepmind/scaling_laws_for_routing/main/data/"
    "curves.csv.gz"
)
SHA256 = "a93902c7cc30ff44e8aac701ee3a8ffec33be3417a85abefa88f7d4c8a50973d"
"""Of the CSV, not of the gzip file."""

_CURVES = flags.DEFINE_string(
    "clark_curves",
    "~/.cache/moe_jax/clark2022/curves.csv.gz",
    f"For claim scaling_law: the data of Clark et al., from {URL}, as CSV or gzipped.",
)

ROUTERS = ("S-Base", "RL-R", "Hash")
"""As the data name them."""

TABLE_3 = {
    "S-Base": Law(-0.082, -0.108, 0.009, 1.104, 1.847, 314.478),
    "RL-R": Law(-0.083, -0.126, 0.012, 1.111, 1.880, 469.982),
    "Hash": Law(-0.087, -0.136, 0.012, 1.157, 4.175, 477.741),
}
CUTOFFS = {"S-Base": 937, "RL-R": 85, "Hash": 83}
"""Of the paper, in billions of parameters; Table 3's three decimals are too few to compute them."""
HALF_A_DIGIT = 0.0005
"""All of Table 3 is printed to three decimals."""

SIZES: Mapping[str, int] = {
    "15M": 16_527_360,
    "25M": 27_279_360,
    "55M": 57_369_600,
    "130M": 132_163_584,
    "370M": 368_123_904,
    "1.3B": 1_308_819_456,
}
"""Label -> N of the base models."""

COLORS = dict(zip(SIZES, colormaps["viridis_r"](np.linspace(0.15, 1, len(SIZES))), strict=True))

SAMPLES = 200
"""Of the bootstrap."""

STATEMENT = f"""
Clark et al. fit log L = a log N + b log Ê + c log N log Ê + d (Equation 1) to the last validation loss
of dense and routed models, for three routers; Ê is the number of experts, but starts at E_start and
saturates at E_max. b < 0 means that experts help, and c > 0 that they help a larger model less: above a
size N_cutoff = 10^(-b/c) not at all. The coefficients of their Table 3 and the cutoffs of 937, 85 and
83 billion are taken from notes of others who quote them with all digits, and were not read in the paper.

Nothing is trained for the fit: it is made to [the authors' data]({URL}) (CC-BY 4.0), which the
command verifies by sha256 {SHA256[:12]}. Models, losses and law are those of the authors' notebook:
every other block is routed, one expert for each token, seed 42, the loss on a held-out part of the
training data after 249,000 steps, dense models as E = 1 for every router. So the dense model of 130M,
whose seeds are others, is left out. The fit is least squares of log10 L. The errors are bootstrapped:
95% of {SAMPLES} fits to resampled models are in the interval, and a quarter of its width is the
standard error. Models of one size are not independent, so that the intervals are rather too narrow.
E_start and E_max are compared as log2, which is what the notebook fits. The coefficients depend on
each other: each may be in its interval although all together fit worse than the refit, as the last
column shows; the three decimals of Table 3 alone move log10 L by up to 0.01. So "reproduced" means
that the authors' data agree with their Table 3 within wide intervals, by their own law. Dense models
are in the fit without saturation, too, which brings its b nearer to 0 than a fit of the routed models
alone. The law comes from one budget of 130 billion tokens; later work that trains longer finds that
experts keep helping large models (as remembered, Krajewski et al.), so that a cutoff is not to be
extrapolated. The last panel has the test losses of claim more_experts: bytes instead of subwords and
models of less than 1M, far outside the fitted sizes.
"""


def clark_models() -> dict[str, Models]:
    """Router -> the authors' models; empty if the file is missing.

    Raises:
      UserError: the file is not the authors'.
    """
    path = pathlib.Path(_CURVES.value).expanduser()
    return dict(_read(path)) if path.exists() else {}


@functools.cache
def _read(path: pathlib.Path) -> Mapping[str, Models]:
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content
    except (OSError, EOFError) as error:
        raise UserError(f"--clark_curves={path} cannot be read ({error}).") from error
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise UserError(f"--clark_curves={path} is not the data of Clark et al.; get it from {URL}")
    return models_of(content.decode())


def models_of(text: str) -> dict[str, Models]:
    """Router -> the models of Table 3, dense ones included, in the CSV of the authors."""
    last: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(io.StringIO(text)):
        known = last.setdefault(row["hyper_id"], row)
        if int(row["step"]) > int(known["step"]):
            last[row["hyper_id"]] = row
    points = collections.defaultdict(list)
    for row in last.values():
        if (float(row["routing_frequency"]), row["k"], row["seed"]) == (0.5, "1", "42"):
            columns = ("dense_parameter_count", "num_experts", "loss_validation")
            points[row["router_type"]].append([float(row[column]) for column in columns])
    return {name: Models(*np.array(points["Dense"] + points[name]).T) for name in ROUTERS}


@dataclasses.dataclass(frozen=True)
class Refit:
    """One router's law.

    Attributes:
      law: the fit.
      low, high: name of a coefficient, or "cutoff" -> ends of its 95% interval.
      error: root mean square error of log10 L.
    """

    law: Law
    low: Mapping[str, float]
    high: Mapping[str, float]
    error: float

    def standard_error(self, name: str) -> float:
        """Such that two make half the 95% interval."""
        return (self.high[name] - self.low[name]) / 4


def refit(models: Models, fit: Callable[[Models], Law]) -> Refit:
    """Fits a law, and again to resampled models."""
    law = fit(models)
    samples = [_numbers(x) for x in bootstrap(models, fit, SAMPLES, np.random.default_rng(0))]
    ends = {
        name: np.quantile([x[name] for x in samples], [0.025, 0.975], method="nearest")
        for name in _numbers(law)
    }
    low, high = ({name: float(end[i]) for name, end in ends.items()} for i in (0, 1))
    return Refit(law, low, high, law.error(models))


def coefficients(law: Law) -> dict[str, float]:
    """By the names of Table 3; E_start and E_max, of which there may be none, as log2."""
    found = {"a": law.a, "b": law.b, "c": law.c, "d": law.d}
    if math.isfinite(law.E_max):
        found |= {"log2 E_start": math.log2(law.E_start), "log2 E_max": math.log2(law.E_max)}
    return found


def _numbers(law: Law) -> dict[str, float]:
    return {**coefficients(law), "cutoff": law.cutoff()}


@functools.cache
def _refits(path: str) -> Mapping[tuple[str, str], Refit]:
    fits = {"with saturation": fit_saturating, "without": fit_bilinear}
    return {
        (router, name): refit(models, fit)
        for router, models in clark_models().items()
        for name, fit in fits.items()
    }


def refits() -> Mapping[tuple[str, str], Refit]:
    """(router, "with saturation" or "without") -> what was fitted; empty if the file is missing."""
    return _refits(_CURVES.value) if clark_models() else {}


def findings(results: Results) -> list[Finding]:
    """Table 3 for each router, that experts help at all sizes, and larger models less."""
    models = clark_models()
    if not models:
        needs = f"the authors' data: download {URL} to {_CURVES.value} or give --clark_curves=FILE"
        statement = "The law refitted to the authors' data has the coefficients of Table 3"
        return [Finding(statement, "Table 3", "no data", Verdict.NOT_RESOLVED, needs)]
    slopes = slopes_by_size(models)
    return [
        *(_agrees(router, refits()[router, "with saturation"]) for router in ROUTERS),
        compare(
            "Experts lower the loss: d log L / d log E is below 0 (of the mean of the routers, over "
            "base sizes)",
            "b < 0 for all routers (Table 3)",
            larger=[0.0],
            smaller=slopes,
            over="base sizes",
        ),
        compare(
            "They help larger models less: the slope is nearer to 0 for the three largest sizes than "
            "for the three smallest",
            "c > 0 for all routers (Table 3)",
            larger=slopes[3:],
            smaller=slopes[:3],
            over="base sizes",
        ),
    ]


def _agrees(router: str, ours: Refit) -> Finding:
    """All six coefficients; contradicted if one is."""
    paper, estimates = coefficients(TABLE_3[router]), coefficients(ours.law)
    judged = [
        agree(
            name,
            f"{paper[name]:.4g}",
            printed=paper[name],
            estimate=estimates[name],
            error=ours.standard_error(name),
            rounding=_rounding(name, TABLE_3[router]),
        )
        for name in paper
    ]
    unresolved = [x.statement for x in judged if x.verdict == Verdict.NOT_RESOLVED]
    return Finding(
        f"Refitted to {router}, each coefficient of the saturating law is that of Table 3",
        "; ".join(f"{x.statement} {x.paper}" for x in judged),
        "; ".join(f"{x.statement} {x.ours}" for x in judged),
        overall(judged),
        f"more models for {', '.join(unresolved)}" if unresolved else "",
    )


def _rounding(name: str, law: Law) -> float:
    """What three printed decimals round off."""
    if name.startswith("log2"):
        value = law.E_start if "start" in name else law.E_max
        return math.log2(1 + HALF_A_DIGIT / value)
    return HALF_A_DIGIT


def slopes_by_size(models: Mapping[str, Models]) -> list[float]:
    """d log L / d log E of each base size, mean of the routers, from a line through routed models."""
    routed = [found[found.E > 1] for found in models.values()]
    return [float(np.mean([slope(x[x.N == N]) for x in routed])) for N in SIZES.values()]


def table(results: Results) -> ResultTable:
    """Rows for Table 3, the refit, and the refit without saturation."""
    columns = [
        "router", "fit", "a", "b", "c", "d", "E_start", "E_max", "N_cutoff (billions)",
        "RMS error of log10 L",
    ]  # fmt: skip
    models, rows = clark_models(), []
    for router, law in TABLE_3.items():
        numbers = [f"{x:.3f}" for x in dataclasses.astuple(law)]
        error = f"{law.error(models[router]):.4f}" if models else "-"
        rows.append([router, "Table 3", *numbers, str(CUTOFFS[router]), error])
        for (name, fit), ours in refits().items():
            if name == router:
                rows.append([router, f"refit, {fit}", *_cells(ours)])
    return ResultTable(columns, rows)


def _cells(ours: Refit) -> list[str]:
    """Estimates with 95% intervals."""

    def cell(name: str, digits: int = 4, power: Callable[[float], float] = lambda x: x) -> str:
        if name not in ours.low:
            return "-"
        ends = (_numbers(ours.law)[name], ours.low[name], ours.high[name])
        value, low, high = (f"{power(x):.{digits}f}" for x in ends)
        return f"{value} [{low}, {high}]"

    linear = [cell(name) for name in "abcd"]
    saturation = [cell("log2 E_start", 2, math.exp2), cell("log2 E_max", 0, math.exp2)]
    cutoff = cell("cutoff", 0, lambda N: N / 1e9)
    return [*linear, *saturation, cutoff, f"{ours.error:.4f}"]


def draw(results: Results, figure: Figure) -> None:
    """Loss against E for each router, against N, the coefficients, and our own models."""
    figure.set_size_inches(11, 7.6)
    above, below = figure.subplots(2, 3)
    models, fits = clark_models(), refits()
    for axes, router in zip(above, ROUTERS, strict=True):
        law = fits[router, "with saturation"].law if fits else None
        _draw_experts(axes, router, models.get(router), law)
    law = fits["S-Base", "with saturation"].law if fits else TABLE_3["S-Base"]
    _draw_sizes(below[0], models.get("S-Base"), law)
    _draw_coefficients(below[1], fits)
    _draw_ours(below[2], results, models.get("S-Base"))


def _draw_experts(axes: Axes, router: str, models: Models | None, law: Law | None) -> None:
    """Figure 2: a line and points for each base size."""
    E = np.geomspace(1, 512, 50)
    for size, N in SIZES.items():
        axes.plot(E, TABLE_3[router].loss(N, E), ":", color=NEUTRAL, linewidth=1)
        if models and law:
            axes.plot(E, law.loss(N, E), color=COLORS[size], linewidth=1)
            found = models[models.N == N]
            axes.plot(found.E, found.loss, "o", color=COLORS[size], markersize=3, label=size)
    axes.plot([], [], ":", color=NEUTRAL, label="Table 3")
    axes.set_title(f"{router}: models and refit")
    axes.set_ylabel("validation loss (nats per token)")
    _log_axes(axes, "experts E", [1, 2, 4, 8, 16, 32, 64, 128, 256, 512], [2, 2.4, 2.8, 3.2])
    axes.set_ylim(1.7, 3.3)  # The legend is below the lines.
    axes.legend(fontsize=8, ncols=3, loc="lower center")


def _draw_sizes(axes: Axes, models: Models | None, law: Law) -> None:
    """Figure 3: a line and points for each number of experts."""
    N = np.geomspace(min(SIZES.values()), max(SIZES.values()), 50)
    counts = (1, 8, 64, 512)
    for E, color in zip(counts, colormaps["plasma_r"](np.linspace(0.2, 0.9, 4)), strict=True):
        axes.plot(N, law.loss(N, E), color=color, linewidth=1, label=f"E = {E}")
        if models:
            found = models[models.E == E]
            axes.plot(found.N, found.loss, "o", color=color, markersize=3)
    axes.set_title("S-Base against size")
    axes.set_ylabel("validation loss (nats per token)")
    _log_axes(axes, "dense parameters N", list(SIZES.values()), [2, 2.4, 2.8, 3.2])
    axes.set_xticklabels(list(SIZES))
    axes.legend(fontsize=8)


def _log_axes(axes: Axes, label: str, x: Sequence[int], y: Sequence[float]) -> None:
    """Logarithmic scales with plain numbers."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(x, [str(tick) for tick in x], fontsize=8)
    axes.set_yticks(y, [f"{tick:g}" for tick in y])
    axes.minorticks_off()
    axes.set_xlabel(label)


def _draw_coefficients(axes: Axes, fits: Mapping[tuple[str, str], Refit]) -> None:
    """The refit less Table 3, in standard errors of the refit."""
    names = list(coefficients(TABLE_3["Hash"]))
    for i, (router, paper) in enumerate(TABLE_3.items()):
        if not fits:
            axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center")
            break
        ours, printed = fits[router, "with saturation"], coefficients(paper)
        for place, name in enumerate(names):
            error = ours.standard_error(name)
            ends = (ours.low[name], coefficients(ours.law)[name], ours.high[name])
            low, value, high = ((end - printed[name]) / error for end in ends)
            y, color = place + 0.22 * (i - 1), ("#0072B2", "#E69F00", "#009E73")[i]
            axes.plot([low, high], [y, y], color=color, linewidth=1)
            label = router if place == 0 else None
            axes.plot(value, y, "o", color=color, markersize=4, label=label)
    axes.axvline(0, color=NEUTRAL, linestyle=":", linewidth=1)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("refit less Table 3 (standard errors)")
    axes.set_title("Coefficients with 95% intervals")
    if fits:
        axes.set_ylim(len(names) + 0.4, -0.6)  # The legend is below them.
        axes.legend(fontsize=8, ncols=3, loc="lower center")


def _draw_ours(axes: Axes, results: Results, models: Models | None) -> None:
    """Loss over that of the dense model: S-Base by base size, and each seed of claim 1."""
    ends = {}
    for size, N in SIZES.items():
        found = models[models.N == N] if models else None
        if found is None or not (found.E == 1).any():
            continue  # The dense model of 130M has other seeds.
        order = np.argsort(found.E)
        loss = found.loss[order] / found.loss[found.E == 1].mean()
        axes.plot(found.E[order], loss, "o-", color=COLORS[size], markersize=2, linewidth=0.8)
        ends[size] = loss[-1]
    below = 0.0
    for size, end in sorted(ends.items(), key=lambda item: item[1]):
        below = max(end, below + 0.01)  # Names of lines that end close together stay legible.
        axes.text(560, below, size, fontsize=7, va="center")
    dense = float(np.mean(results[more_experts.side_name(1)].test_losses))
    for E in more_experts.EXPERTS:
        losses = np.array(results[more_experts.side_name(E)].test_losses) / dense
        label = "here, each seed" if E == 1 else None
        axes.plot([E] * losses.size, losses, "s", color=SPARSE, markersize=4, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xlim(0.8, 1500)
    axes.set_xticks([1, 8, 64, 512], ["1", "8", "64", "512"])
    axes.set(xlabel="experts E (1: dense)", ylabel="loss / loss of the dense model")
    axes.set_title("S-Base by size, and ours")
    axes.legend(fontsize=8)


CLAIM = Claim(
    name="scaling_law",
    title="One law in model size and number of experts describes routed models (Clark et al.)",
    statement=STATEMENT.strip(),
    sides=more_experts.sides,
    findings=findings,
    table=table,
    draw=draw,
)
