"""Without a balancing loss routing collapses (Shazeer et al., OLMoE); a bias balances, too."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.claims import _text
from moe_jax.analysis.figures import DENSE, SPARSE
from moe_jax.reproduction.claim import TEST, Claim, Measurement, Profile, ResultTable, Side
from moe_jax.reproduction.results import FinishedRun, Results, SideResult
from moe_jax.reproduction.verdicts import Finding, compare, describe
from moe_jax.routing.deepseek import DeepSeekV3
from moe_jax.routing.losses import Losses
from moe_jax.training.observation import routing_statistics
from moe_jax.training.trained import Trained

# Names of the sides. Switch's router at coefficients of its loss:
NO_LOSS, LOSS_MILLI, LOSS, LOSS_TENTH, LOSS_ONE = (
    "no loss",
    "loss 0.001",
    "loss 0.01",
    "loss 0.1",
    "loss 1",
)
# The router of loss-free balancing: with nothing that balances, with a loss, with a bias.
SIGMOID_NOTHING, SIGMOID_LOSS = "sigmoid, no loss", "sigmoid, loss 0.001"
BIAS_SLOW, BIAS, BIAS_FAST = "sigmoid, bias 0.0001", "sigmoid, bias 0.001", "sigmoid, bias 0.01"

DRAWN_OVER_TRAINING = (NO_LOSS, LOSS, SIGMOID_NOTHING, BIAS)

COEFFICIENTS = {NO_LOSS: 0.0, LOSS_MILLI: 1e-3, LOSS: 1e-2, LOSS_TENTH: 1e-1, LOSS_ONE: 1.0}
SIGMOID = (SIGMOID_NOTHING, SIGMOID_LOSS, BIAS_SLOW, BIAS, BIAS_FAST)

STATEMENT = """
Shazeer et al. (Table 6) train without balancing losses to a perplexity of 39.8, where the most loaded
expert has 17.80 times the mean load (coefficients of variation: 3.04 of the importance, 3.01 of the
load), and to 35.6 to 35.7 with any coefficients of their two losses from 0.01 to 1, at 1.37 to 1.07
times the mean. In OLMoE (Figures 9 and 10) routing collapses to 1 or 2 experts of a layer without the
loss. Switch found 0.01 among 0.1 to 0.00001 to balance without harm. Loss-free balancing (Wang et al.)
moves a bias of each expert's score by gamma after each step instead: its MaxViolation, the largest
load over the mean minus 1, on held-out data is 0.04 where a loss leaves 0.72, and the perplexity is
9.50 against 9.56 (1B; 3B: 0.52 -> 0.04, 7.97 -> 7.92); gamma 0.0001 is slow and 0.01 oscillates
(its Figure 4).

Here Switch's router (softmax, top-1 of 8, capacity factor 1.25 in training and 2.0 in evaluation,
gates times 4 and router weights that begin at 1 over the root of the width) runs with Switch's loss at
five coefficients. The bias needs the router of its paper: sigmoid scores, gates without renormalisation,
times 2 here so that an expert's output starts as large as a dense layer's. It is compared with itself
alone: with no balancing and with a loss of 0.001, the coefficient of the paper's baseline as
remembered. Unlike there, the choice is top-1 of 8 without shared experts (there 6 of 64 with 2), and
tokens beyond an expert's capacity are dropped in all sides, so that imbalance costs quality in
two ways: experts that learn nothing, and tokens that no expert serves. Loads are of the choices before
any drop, on the test split and as means over the MoE layers; over training they are those of single
batches, as running means of five records, which would hide an oscillation: whether 0.01 oscillates is
not tested. A bias moves by at most gamma times the steps, of which there are far fewer here than there,
so that the best gamma may be a larger one. That a loss costs quality is contested: in Shazeer et al.'s
table its coefficient hardly matters, loss-free balancing is built on the interference. The difference
in quality that it prints, 0.006 nats, is smaller than what three runs of this size can resolve.
"""


def held_out_balance(trained: Trained) -> dict[str, float]:
    """How evenly the test split is routed, as means over the MoE layers.

    Returns:
      Some of `moe_jax.routing.study.summarize`: max_violation_global (max/mean load - 1), load_cv,
      importance_cv, dead_experts (a count) and dropped (a fraction).
    """
    batches = trained.run.config.evaluation.batches
    layers = routing_statistics(trained, trained.open_data(), "test", batches).values()
    names = ("max_violation_global", "load_cv", "importance_cv", "dead_experts", "dropped")
    return {name: float(np.mean([layer[name] for layer in layers])) for name in names}


BALANCE = Measurement("balance", held_out_balance)


def sides(profile: Profile) -> list[Side]:
    """Coefficients of Switch's loss; then the sigmoid router alone, with a loss, and with biases."""
    changes: dict[str, Mapping[str, Any]] = {
        name: {"model.moe.router.losses.load_balancing": coefficient}
        for name, coefficient in COEFFICIENTS.items()
    }
    changes |= {
        SIGMOID_NOTHING: {"model.moe.router": _sigmoid()},
        SIGMOID_LOSS: {"model.moe.router": _sigmoid(coefficient=1e-3)},
        BIAS_SLOW: {"model.moe.router": _sigmoid(bias_rate=1e-4)},
        BIAS: {"model.moe.router": _sigmoid(bias_rate=1e-3)},
        BIAS_FAST: {"model.moe.router": _sigmoid(bias_rate=1e-2)},
    }
    measurements = (TEST, BALANCE)
    return [
        _text.side(profile, name, {**_text.LIMITED, **changes[name]}, measurements=measurements)
        for name in changes
    ]


def _sigmoid(coefficient: float = 0.0, bias_rate: float = 0.0) -> DeepSeekV3:
    """The router of loss-free balancing with one choice."""
    return DeepSeekV3(
        k=1,
        losses=Losses(expert_level=coefficient),
        groups=1,
        groups_per_token=1,
        renormalize=False,
        gate_scale=2.0,
        bias_rate=bias_rate,
    )


def findings(results: Results) -> list[Finding]:
    """Balance and quality with and without the loss, then the bias beside both."""
    slow, usual = (_early_violations(results[name]) for name in (BIAS_SLOW, BIAS))
    return [
        compare(
            "Without a balancing loss the most loaded expert has more of the tokens than with one of "
            "0.01 (largest load over mean load)",
            "17.80 against 1.37 with 0.01 of both losses (Shazeer et al., Table 6)",
            _balance(results[NO_LOSS], max_over_mean), _balance(results[LOSS], max_over_mean),
        ),
        compare(
            "Without a balancing loss the test loss is higher than with one of 0.01",
            "perplexity 39.8 against 35.7, 0.109 nats per word (Shazeer et al., Table 6)",
            results[NO_LOSS].test_losses, results[LOSS].test_losses, unit="nats per byte",
        ),
        compare(
            "A bias moved by 0.001 balances: MaxViolation is smaller than with nothing that balances",
            "0.04 with the bias (loss-free balancing, 1B)",
            _balance(results[SIGMOID_NOTHING], max_violation),
            _balance(results[BIAS], max_violation),
        ),
        compare(
            "The bias of 0.001 balances better than a loss of 0.001 (MaxViolation)",
            "0.72 with the loss against 0.04 with the bias (loss-free balancing, 1B)",
            _balance(results[SIGMOID_LOSS], max_violation), _balance(results[BIAS], max_violation),
        ),
        compare(
            "The bias of 0.001 has a lower test loss than the balancing loss of 0.001",
            "perplexity 9.56 against 9.50, 0.006 nats per token (loss-free balancing, 1B)",
            results[SIGMOID_LOSS].test_losses, results[BIAS].test_losses, unit="nats per byte",
            decisive=False,  # The paper's own difference is less than these runs can tell.
        ),
        compare(
            "A bias moved by 0.0001 is slower than by 0.001: MaxViolation of training batches, mean of "
            "the first quarter of the steps",
            "0.0001 balances slowly at first (loss-free balancing, Figure 4)",
            slow, usual,
        ),
    ]  # fmt: skip


def max_violation(balance: Mapping[str, float]) -> float:
    """Largest load over the mean load, minus 1, from `held_out_balance`."""
    return balance["max_violation_global"]


def max_over_mean(balance: Mapping[str, float]) -> float:
    """Largest load over the mean load."""
    return max_violation(balance) + 1


def _balance(side: SideResult, value: Callable[[Mapping[str, float]], float]) -> list[float]:
    """Of each seed; infinite for a run that diverged."""
    return side.sample(
        lambda run: math.inf if run.diverged_at is not None else value(run.measured["balance"])
    )


def _early_violations(side: SideResult) -> list[float]:
    """Mean MaxViolation in the first quarter of each seed's training; infinite if it diverged."""

    def mean(run: FinishedRun) -> float:
        if run.diverged_at is not None:
            return math.inf
        steps, violations = over_training(run, side.config.model.moe_layers, violation_of_load)
        return float(violations[steps <= side.config.steps / 4].mean())

    return side.sample(mean)


def over_training(
    run: FinishedRun, layers: Sequence[int | str], load_evenness: Callable[[np.ndarray], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Steps [n] and the mean over MoE layers [n] of a statistic of single batches' loads [n, E]."""
    series = [run.series(f"router/{layer}/load") for layer in layers]
    steps = series[0][0]
    return steps, np.mean([load_evenness(loads) for _, loads in series], axis=0)


def violation_of_load(loads: np.ndarray) -> np.ndarray:
    """MaxViolation [n] of loads [n, E]."""
    return loads.max(axis=1) / loads.mean(axis=1) - 1


def variation_of_load(loads: np.ndarray) -> np.ndarray:
    """Coefficient of variation [n] of loads [n, E]."""
    return loads.std(axis=1) / loads.mean(axis=1)


def dead_of_load(loads: np.ndarray) -> np.ndarray:
    """How many experts have no token [n], of loads [n, E]."""
    return (loads == 0).sum(axis=1)


PUBLISHED = {
    NO_LOSS: "Shazeer, none: perplexity 39.8, max/mean 17.80, CV 3.01 and 3.04",
    LOSS_MILLI: "-",
    LOSS: "Shazeer, 0.01 of both: 35.7, 1.37, 0.11 and 0.48",
    LOSS_TENTH: "Shazeer, 0.1 of both: 35.6, 1.14, 0.05 and 0.06",
    LOSS_ONE: "Shazeer, 1 of both: 35.7, 1.07, 0.02 and 0.03",
    SIGMOID_NOTHING: "-",
    SIGMOID_LOSS: "loss-free balancing, 1B: perplexity 9.56, max/mean 1.72",
    BIAS_SLOW: "loss-free balancing: slow at first",
    BIAS: "loss-free balancing, 1B: 9.50, 1.04",
    BIAS_FAST: "loss-free balancing: oscillates",
}
"""Side -> what papers print of the setting nearest to it."""


def table(results: Results) -> ResultTable:
    """A row for each side: loss, balance on the test split, and the papers' figures."""
    columns = [
        "side",
        "test loss (nats per byte)",
        "max/mean load",
        "CV of load",
        "CV of importance",
        "dead experts of 8",
        "dropped (%)",
        "papers (CV of load and of importance)",
    ]
    values: list[Callable[[Mapping[str, float]], float]] = [
        max_over_mean,
        lambda balance: balance["load_cv"],
        lambda balance: balance["importance_cv"],
        lambda balance: balance["dead_experts"],
        lambda balance: 100 * balance["dropped"],
    ]
    rows = [
        [
            name,
            describe(side.test_losses),
            *(describe(_balance(side, value)) for value in values),
            PUBLISHED[name],
        ]
        for name, side in results.sides.items()
    ]
    return ResultTable(columns, rows)


@dataclasses.dataclass(frozen=True)
class _Printed:
    """Points of a paper: MaxViolation and perplexity, and what they are."""

    label: str
    color: str
    marker: str
    points: Mapping[str, tuple[float, float]]


_PRINTED = [
    _Printed(
        "Shazeer, Table 6", "#CC79A7", "^",
        {
            "no loss": (16.80, 39.8), "0.01": (0.37, 35.7), "0.1": (0.14, 35.6), "1": (0.07, 35.7),
        },
    ),
    _Printed("loss-free balancing, 1B", "#009E73", "s", {"loss": (0.72, 9.56), "bias": (0.04, 9.50)}),
    _Printed("loss-free balancing, 3B", "#E69F00", "D", {"loss": (0.52, 7.97), "bias": (0.04, 7.92)}),
]  # fmt: skip


def draw(results: Results, figure: Figure) -> None:
    """Loads, MaxViolation, CV and dead experts over training; loss against balance."""
    figure.set_size_inches(14, 10)
    axes = figure.subplot_mosaic("abcd;efgh;iijk")
    for panel, name in zip("abcd", DRAWN_OVER_TRAINING, strict=True):
        _draw_load(axes[panel], results[name])
    _draw_violations(axes["e"], results, tuple(COEFFICIENTS), "Switch's router and loss")
    _draw_violations(axes["f"], results, SIGMOID, "Sigmoid router: loss and bias")
    _draw_variation(axes["g"], results)
    _draw_dead(axes["h"], results)
    _draw_losses(axes["i"], results)
    _draw_trade_off(axes["j"], results)
    _draw_papers(axes["k"])


def _draw_load(axes: Axes, side: SideResult) -> None:
    """Shares of the experts of the first MoE layer, stacked (OLMoE, Figure 10)."""
    layer, run = side.config.model.moe_layers[0], side.runs[0]
    steps, loads = run.series(f"router/{layer}/load")
    shares = 100 * loads / loads.sum(axis=1, keepdims=True)
    colors = colormaps["cividis"](np.linspace(0, 1, shares.shape[1]))
    axes.stackplot(steps, shares.T, colors=colors, edgecolor="white", linewidth=0.2)
    axes.margins(0)
    axes.set(
        xlabel="step",
        ylabel="share of tokens by expert (%)",
        title=f"{side.side.name}\nblock {layer}, seed {run.seed}",
    )


def _draw_violations(axes: Axes, results: Results, names: Sequence[str], title: str) -> None:
    _draw_over_training(axes, results, names, violation_of_load)
    axes.set_yscale("log")
    axes.set(xlabel="step", ylabel="MaxViolation of batches", title=f"{title}\n(means of seeds)")
    axes.legend(fontsize=7)


def _draw_variation(axes: Axes, results: Results) -> None:
    _draw_over_training(axes, results, DRAWN_OVER_TRAINING, variation_of_load)
    axes.set_yscale("log")
    axes.set(xlabel="step", ylabel="CV of load", title="Variation in batches\n(means of seeds)")
    axes.legend(fontsize=7)


def _draw_dead(axes: Axes, results: Results) -> None:
    _draw_over_training(axes, results, DRAWN_OVER_TRAINING, dead_of_load)
    axes.set_ylim(-0.1, 8)  # All experts of a layer.
    axes.set(
        xlabel="step",
        ylabel="experts without a token (of 8)",
        title="Dead experts in batches\n(means of seeds)",
    )
    axes.legend(fontsize=7)


def _draw_over_training(
    axes: Axes,
    results: Results,
    names: Sequence[str],
    load_evenness: Callable[[np.ndarray], np.ndarray],
) -> None:
    """A line for each side: mean over seeds that did not diverge, running mean of five records."""
    for name, color in zip(
        names, colormaps["viridis"](np.linspace(0, 0.9, len(names))), strict=True
    ):
        side = results[name]
        layers = side.config.model.moe_layers
        series = [
            over_training(r, layers, load_evenness) for r in side.runs if r.diverged_at is None
        ]
        if series:
            steps = series[0][0]
            mean = np.mean([values for _, values in series], axis=0)
            axes.plot(*_smoothed(steps, mean), color=color, linewidth=1.2, label=name)


def _smoothed(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Running mean of five records, at the middle one's step."""
    width = min(5, len(values))
    half = width // 2
    return steps[half : len(steps) - (width - 1 - half)], np.convolve(
        values, np.full(width, 1 / width), mode="valid"
    )


def _draw_losses(axes: Axes, results: Results) -> None:
    """A group of points for each side."""
    names = list(results.sides)
    for place, name in enumerate(names):
        losses = results[name].test_losses
        axes.plot([place] * len(losses), losses, "o", color=_color(name), markersize=4)
        axes.plot(place, np.mean(losses), "_", color=_color(name), markersize=14)
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=7)
    axes.set(ylabel="test loss (nats per byte)", title="Loss\n(points: seeds, dash: their mean)")


def _color(name: str) -> str:
    return SPARSE if name in COEFFICIENTS else DENSE


def _draw_trade_off(axes: Axes, results: Results) -> None:
    """Loss against imbalance, a point for each seed (loss-free balancing, Figure 2)."""
    markers = ("o", "v", "s", "^", "D")
    for group in (tuple(COEFFICIENTS), SIGMOID):
        for name, marker in zip(group, markers, strict=True):
            side = results[name]
            violations = _balance(side, max_violation)
            axes.plot(
                violations, side.test_losses, marker, color=_color(name), markersize=4, label=name
            )
    axes.set_xscale("log")
    axes.set(
        xlabel="MaxViolation, test split",
        ylabel="test loss (nats per byte)",
        title="Loss and balance, each seed",
    )
    axes.legend(fontsize=6)


def _draw_papers(axes: Axes) -> None:
    """The same of the papers: perplexities as nats above the best of the paper."""
    for printed in _PRINTED:
        violations = [x for x, _ in printed.points.values()]
        losses = np.log([y for _, y in printed.points.values()])
        losses -= losses.min()
        axes.plot(
            violations,
            losses,
            printed.marker + ":",
            color=printed.color,
            markersize=5,
            label=f"{printed.label}: {', '.join(printed.points)}",
        )
    axes.set_xscale("log")
    axes.set(
        xlabel="MaxViolation",
        ylabel="loss above the paper's best (nats)",
        title="What the papers print\n(right to left as named)",
    )
    axes.legend(fontsize=6, loc="upper left")


CLAIM = Claim(
    name="balancing",
    title="Without a balancing loss routing collapses; a bias balances without one",
    statement=STATEMENT.strip(),
    sides=sides,
    findings=findings,
    table=table,
    draw=draw,
)
