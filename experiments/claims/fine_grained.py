"""Many narrow experts and a shared one beat few wide ones (DeepSeekMoE), and specialise more."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.claims import _text
from moe_jax.analysis.figures import DENSE, NEUTRAL, SPARSE
from moe_jax.configuration import changed
from moe_jax.models.decoder_lm import DecoderLMConfig
from moe_jax.reproduction.claim import (
    TEST,
    Claim,
    Measurement,
    Profile,
    ResultTable,
    Side,
    read_config,
)
from moe_jax.reproduction.measurements import test_split, test_split_with
from moe_jax.reproduction.results import FinishedRun, Results
from moe_jax.reproduction.verdicts import Finding, compare, describe
from moe_jax.routing.losses import Losses
from moe_jax.routing.router import RouterInputs
from moe_jax.routing.token_choice import TopK
from moe_jax.training.run import Run
from moe_jax.training.trained import Trained

EXPERTS, CHOICES = 16, 2
"""Of the side that is not segmented, as in DeepSeekMoE's validation experiments."""


@dataclasses.dataclass(frozen=True)
class Experts:
    """How the width of 16 experts, 2 of which serve a token, is divided.

    Attributes:
      segments: m, narrow experts made of each.
      shared: how many of the narrow experts every token visits.
      widening: what the width of all experts is multiplied with.
    """

    segments: int
    shared: int
    widening: float = 1.0

    @property
    def routed(self) -> int:
        """Narrow experts that the router chooses from."""
        return EXPERTS * self.segments - self.shared

    @property
    def choices(self) -> int:
        """Of routed experts, for each token."""
        return CHOICES * self.segments - self.shared

    def width(self, dense: int) -> int:
        """Of a narrow expert.

        Args:
          dense: the width of a dense layer, and of an expert before it is segmented.
        """
        return int(dense * self.widening) // self.segments

    @property
    def gate_scale(self) -> float:
        """What the gates are multiplied by.

        The sum of the routed experts begins as large on all sides as if gates were 1 / sqrt(m): narrow
        experts have outputs as large as wide ones, and a sum over m times as many independent ones is
        sqrt(m) times as large. Gates begin as the softmax of normal logits of deviation 1.
        """
        quantiles = (np.arange(self.routed) + 0.5) / self.routed
        weights = np.exp([NormalDist().inv_cdf(quantile) for quantile in quantiles])
        best = (weights / weights.sum())[-self.choices :]
        return round(math.sqrt(self.choices / self.segments) / float(np.linalg.norm(best)), 3)

    def changes(self, dense: DecoderLMConfig) -> dict[str, Any]:
        """Of a config with that model, whose dense layers are as wide as its experts."""
        assert isinstance(dense.moe.router, TopK)
        router = TopK(
            k=self.choices,
            gate_scale=self.gate_scale,
            losses=Losses(expert_level=1e-2),
            init_deviation=dense.moe.router.init_deviation,
        )
        return {
            "model.num_experts": self.routed,
            "model.expert_width": self.width(dense.mlp_width),
            "model.moe.router": router,
            "model.moe.shared_experts": self.shared,
        }


GSHARD, WIDER_GSHARD, DEEPSEEK = "GShard: 16", "GShard x 1.5: 16", "DeepSeekMoE: 63 + 1"
COARSE_SHARED, HALVES, HALVES_SHARED = "15 + 1", "32", "31 + 1"
HALVES_TWO_SHARED, QUARTERS, TWO_SHARED = "30 + 2", "64", "62 + 2"

SIDES: Mapping[str, Experts] = {
    GSHARD: Experts(segments=1, shared=0),
    COARSE_SHARED: Experts(segments=1, shared=1),
    HALVES: Experts(segments=2, shared=0),
    HALVES_SHARED: Experts(segments=2, shared=1),
    HALVES_TWO_SHARED: Experts(segments=2, shared=2),
    QUARTERS: Experts(segments=4, shared=0),
    DEEPSEEK: Experts(segments=4, shared=1),
    TWO_SHARED: Experts(segments=4, shared=2),
    WIDER_GSHARD: Experts(segments=1, shared=0, widening=1.5),
}
"""Name -> experts; the names count routed and shared ones. Two whole experts that are shared would
leave none of the two choices to a router."""

PUBLISHED = {GSHARD: 1.867, DEEPSEEK: 1.808, TWO_SHARED: 1.806, WIDER_GSHARD: 1.808}
"""Side -> loss in nats per token on the Pile (DeepSeekMoE, Tables 1 and 2 and section 4.4)."""
PUBLISHED_WITHOUT_SHARED = 2.414
"""The same of DeepSeekMoE without its shared expert and with one routed expert more (section 4.5)."""

DISABLED = (1 / 16, 2 / 16, 3 / 16, 4 / 16)
"""Shares of the routed experts, the most probable ones of each token, that are disabled."""
FEWER_CHOICES = (3, 4, 5, 6)
"""Routed experts for each token, of 7 in training."""

COLORS = {
    GSHARD: DENSE,
    WIDER_GSHARD: "#E69F00",
    COARSE_SHARED: "#CC79A7",
    HALVES: "#009E73",
    HALVES_SHARED: "#009E73",
    HALVES_TWO_SHARED: "#009E73",
    QUARTERS: "#56B4E9",
    TWO_SHARED: "#56B4E9",
    DEEPSEEK: SPARSE,
}

STATEMENT = """
DeepSeekMoE splits each of a GShard model's 16 experts, of which 2 serve a token, into 4 narrow ones,
and lets every token visit one of these: total and activated parameters stay the same, and the loss
falls from 1.867 to 1.808 (Table 1), that of a GShard model with experts 1.5 times as wide (1.808,
Table 2). Its Figure 3 takes the steps one by one: a shared expert helps, and so does splitting by 2
and by 4; 1, 2 and 4 shared experts of 64 give 1.808, 1.806 and 1.811 (section 4.4). As a sign of
specialisation it disables experts of the trained model: without the shared expert, and with one
routed expert more in its place, the loss is 2.414; without the most probable experts of each token it
loses more than the wider GShard model (Figure 4); and 4 routed experts of the 7 are enough for
GShard's loss (Figure 5). Shared experts are contested: in OLMoE (Figure 6; the setting as remembered)
31 routed experts and a shared one, 4 of them activated, do slightly worse than 32 routed ones with 4.

Here the routed experts of all sides have softmax gates without renormalisation, as DeepSeekMoE's;
GShard renormalises its two. All have the expert-level balancing loss of 0.01 and no capacity limit, so
that nothing is dropped. Gates are multiplied so that the routed experts' sum starts equally large on
all sides; DeepSeekMoE has no such factor, and small initial weights. Parameters and FLOPs are the same
but for the router, which has one column for each routed expert: up to 1% of all parameters and 5% of
the activated ones of the model for CPUs. Whole experts are not combined with two shared ones, which
would leave nothing to route. When experts are disabled, the gates of the rest stay as they were. The
finding without the shared expert was declared as a comparison of two samples, as most are, although
both are evaluations of the same parameters: its differences by seed are the sharper reading.
DeepSeekMoE trains 2B parameters on 100B tokens; ours is far smaller, predicts bytes, and is trained on
far fewer, which may not be enough for narrow experts to specialise.
"""


@dataclasses.dataclass
class WithoutBest(TopK):
    """A router to evaluate with: the K most probable experts after the best ones, at their gates.

    Attributes:
      disabled: the most probable experts of each token, which it cannot choose.
    """

    disabled: int = 0

    def ranking(self, logits: jax.Array, inputs: RouterInputs) -> jax.Array:
        """[S, E] the logits, and -inf for each token's disabled experts."""
        best, _ = jax.lax.top_k(logits, self.disabled)
        return jnp.where(logits >= best[:, -1:], -jnp.inf, logits)


def test_split_without_best(trained: Trained, share: float) -> dict[str, float]:
    """What the test split gives if each token's most probable experts are disabled.

    Args:
      trained: the run; its router is a TopK.
      share: of the routed experts, rounded to at least one.
    """
    model = decoder(trained)
    router = model.moe.router
    fields = {field.name: getattr(router, field.name) for field in dataclasses.fields(router)}
    without = WithoutBest(**fields, disabled=round(share * model.num_experts))
    # Not by Run.build, which takes only routers that a config file can hold.
    run = Run.on(changed(trained.run.config, {"model.moe.router": without}), trained.run.mesh)
    return test_split(dataclasses.replace(trained, run=run))


def test_split_without_shared(trained: Trained) -> dict[str, float]:
    """What the test split gives without the shared experts and with as many more routed ones."""
    moe = decoder(trained).moe
    return test_split_with(
        dataclasses.replace(trained, parameters=without_shared(trained.parameters)),
        {"model.moe.router.k": moe.router.choices + moe.shared_experts},
    )


def without_shared(parameters: Any) -> Any:
    """The parameters of a model with 0 for those of shared experts, whose output is 0 then."""

    def disabled(path: Any, parameter: jax.Array) -> jax.Array:
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        return jnp.zeros_like(parameter) if "shared" in names else parameter

    return jax.tree_util.tree_map_with_path(disabled, parameters)


def decoder(trained: Trained) -> DecoderLMConfig:
    """The config of a run's model."""
    model = trained.run.config.model
    assert isinstance(model, DecoderLMConfig)
    return model


def without_best(share: float) -> Measurement:
    """`test_split_without_best`."""
    measure = functools.partial(test_split_without_best, share=share)
    return Measurement(f"test without the best {16 * share:g}/16 of the experts", measure)


def with_choices(choices: int) -> Measurement:
    """The test split with another number of routed experts for each token."""
    measure = functools.partial(test_split_with, changes={"model.moe.router.k": choices})
    return Measurement(f"test with {choices} routed experts for each token", measure)


WITHOUT_SHARED = Measurement(
    "test without shared experts and with more routed ones", test_split_without_shared
)


def sides(profile: Profile) -> list[Side]:
    """Segmentations and shared experts at fixed totals, and wider experts."""
    dense: Any = read_config(_text.FILES[profile]).model
    disabling = tuple(map(without_best, DISABLED))
    extra = {
        DEEPSEEK: (WITHOUT_SHARED, *disabling, *map(with_choices, FEWER_CHOICES)),
        WIDER_GSHARD: disabling,
    }
    return [
        _text.side(
            profile,
            name,
            experts.changes(dense),
            measurements=(TEST, *extra.get(name, ())),
        )
        for name, experts in SIDES.items()
    ]


def findings(results: Results) -> list[Finding]:
    """The whole, its two parts with both sides of the dispute, and what is lost without experts."""

    def lower(
        worse: str, better: str, statement: str, paper: str, decisive: bool = True
    ) -> Finding:
        first, second = (results[name].test_losses for name in (worse, better))
        return compare(statement, paper, first, second, unit="nats per byte", decisive=decisive)

    deepseek, wider = results[DEEPSEEK], results[WIDER_GSHARD]
    return [
        lower(
            GSHARD, DEEPSEEK,
            "DeepSeekMoE: 7 of 63 narrow experts and a shared one have a lower test loss than GShard's "
            "2 of 16",
            "1.867 -> 1.808 (Table 1)",
        ),
        lower(
            COARSE_SHARED, DEEPSEEK,
            "DeepSeekMoE: beside a shared expert, experts split by 4 have a lower test loss than "
            "whole ones",
            "bars without printed losses (Figure 3)",
        ),
        lower(
            GSHARD, COARSE_SHARED,
            "DeepSeekMoE: 1 of 15 experts and a shared one have a lower test loss than 2 of 16",
            "bars without printed losses (Figure 3)",
            decisive=False,  # This and the next are the two sides of a dispute.
        ),
        lower(
            HALVES_SHARED, HALVES,
            "OLMoE: 4 of 32 experts have a lower test loss than 3 of 31 and a shared one",
            "curves that differ slightly (OLMoE, Figure 6)",
            decisive=False,
        ),
        compare(
            "DeepSeekMoE: without the shared expert and with one routed expert more, the trained model's "
            "test loss is higher",
            f"{PUBLISHED[DEEPSEEK]} -> {PUBLISHED_WITHOUT_SHARED} (section 4.5)",
            deepseek.sample(functools.partial(loss_of, measurement=WITHOUT_SHARED)),
            deepseek.test_losses,
            unit="nats per byte",
        ),
        compare(
            "DeepSeekMoE: disabling the best 1/16 to 4/16 of each token's experts raises its test loss "
            "more than that of GShard x 1.5 (mean increase)",
            "curves without printed losses (Figure 4)",
            deepseek.sample(increase_without_best), wider.sample(increase_without_best),
            unit="nats per byte",
        ),
    ]  # fmt: skip


def loss_of(run: FinishedRun, measurement: Measurement) -> float:
    """The loss that a measurement found; infinite if the run diverged."""
    return np.inf if run.diverged_at is not None else run.measured[measurement.name]["eval/loss"]


def increase_without_best(run: FinishedRun) -> float:
    """Mean over `DISABLED` of what disabling adds to the test loss; infinite if the run diverged."""
    if run.diverged_at is not None:
        return np.inf
    return float(np.mean([loss_of(run, without_best(share)) for share in DISABLED])) - run.test_loss


def table(results: Results) -> ResultTable:
    """A row for each side, and one for each way in which DeepSeekMoE lost experts."""
    columns = [
        "experts (routed + shared)",
        "segmentation",
        "routed experts for each token",
        "test loss here (nats per byte)",
        "less GShard's",
        "the paper's (nats per token)",
        "less GShard's there",
    ]
    reference = float(np.mean(results[GSHARD].test_losses))

    def row(
        name: str, experts: Experts, choices: int, losses: Sequence[float], paper: float | None
    ) -> list[str]:
        ours = [describe(losses), f"{np.mean(losses) - reference:+.3f}"]
        there = ["-", "-"] if paper is None else [f"{paper}", f"{paper - PUBLISHED[GSHARD]:+.3f}"]
        return [name, str(experts.segments), str(choices), *ours, *there]

    rows = [
        row(name, experts, experts.choices, results[name].test_losses, PUBLISHED.get(name))
        for name, experts in SIDES.items()
    ]
    deepseek, experts = results[DEEPSEEK], SIDES[DEEPSEEK]

    def later(change: str, measurement: Measurement, choices: int, paper: float | None) -> None:
        losses = deepseek.sample(functools.partial(loss_of, measurement=measurement))
        rows.append(row(f"{DEEPSEEK}, {change}", experts, choices, losses, paper))

    later(
        "shared one disabled after training",
        WITHOUT_SHARED,
        experts.choices + experts.shared,
        PUBLISHED_WITHOUT_SHARED,
    )
    for choices in FEWER_CHOICES:
        later("fewer routed ones after training", with_choices(choices), choices, None)
    return ResultTable(columns, rows)


def draw(results: Results, figure: Figure) -> None:
    """Gains over GShard here and in the paper, and losses without experts."""
    figure.set_size_inches(11, 8)
    (gains, papers), (disabled, fewer) = figure.subplots(2, 2, width_ratios=(1.3, 1))
    _draw_gains(gains, results)
    _draw_papers(papers)
    _draw_disabled(disabled, results)
    _draw_fewer(fewer, results)


def _draw_gains(axes: Axes, results: Results) -> None:
    """A bar for each side's mean, and a point for each seed; the first side on top."""
    reference = float(np.mean(results[GSHARD].test_losses))
    for place, name in enumerate(SIDES):
        gains = reference - np.array(results[name].test_losses)
        axes.barh(place, gains.mean(), color=COLORS[name], alpha=0.5)
        axes.plot(gains, [place] * len(gains), "o", color="black", markersize=3)
    axes.set_yticks(range(len(SIDES)), list(SIDES))
    axes.set(
        xlabel="test loss below the mean of GShard (nats per byte)",
        ylabel="experts (routed + shared)",
        title="Here: mean (bar) and each seed (points)",
    )
    _mark_gshard(axes)


def _draw_papers(axes: Axes) -> None:
    for place, (name, loss) in enumerate(PUBLISHED.items()):
        axes.barh(place, PUBLISHED[GSHARD] - loss, color=COLORS[name], alpha=0.5)
    axes.set_yticks(range(len(PUBLISHED)), list(PUBLISHED))
    axes.set(
        xlabel="loss below GShard's (nats per token)",
        title="The paper (Tables 1, 2; section 4.4)",
    )
    _mark_gshard(axes)


def _mark_gshard(axes: Axes) -> None:
    axes.axvline(0, color=NEUTRAL, linestyle=":", linewidth=1)
    axes.invert_yaxis()


def _draw_disabled(axes: Axes, results: Results) -> None:
    """Losses against the share of disabled experts, and those without the shared expert."""
    for name in (DEEPSEEK, WIDER_GSHARD):
        for i, run in enumerate(results[name].runs):
            losses = [run.test_loss, *(loss_of(run, without_best(share)) for share in DISABLED)]
            label = f"{name}, each seed" if i == 0 else None
            axes.plot((0, *DISABLED), losses, ".-", color=COLORS[name], linewidth=0.9, label=label)
    for i, run in enumerate(results[DEEPSEEK].runs):
        label = "without its shared expert, each seed" if i == 0 else None
        loss = loss_of(run, WITHOUT_SHARED)
        axes.plot([0], [loss], "x", color=COLORS[DEEPSEEK], markersize=6, label=label)
    axes.set_xticks((0, *DISABLED), ["0", *(f"{16 * share:g}/16" for share in DISABLED)])
    axes.set(
        xlabel="disabled share of routed experts, the best of each token",
        ylabel="test loss (nats per byte)",
        title="Experts disabled after training",
    )
    axes.legend(fontsize=8)


def _draw_fewer(axes: Axes, results: Results) -> None:
    """Losses of DeepSeekMoE against the routed experts for each token, beside GShard's."""
    trained = SIDES[DEEPSEEK].choices
    for i, run in enumerate(results[DEEPSEEK].runs):
        losses = [*(loss_of(run, with_choices(k)) for k in FEWER_CHOICES), run.test_loss]
        label = f"{DEEPSEEK}, each seed" if i == 0 else None
        axes.plot(
            (*FEWER_CHOICES, trained), losses, ".-", color=COLORS[DEEPSEEK], linewidth=0.9, label=label
        )  # fmt: skip
    for name in (GSHARD, WIDER_GSHARD):
        for i, loss in enumerate(results[name].test_losses):
            label = f"{name}, each seed" if i == 0 else None
            axes.axhline(loss, color=COLORS[name], linestyle="--", linewidth=1, label=label)
    axes.set_xticks((*FEWER_CHOICES, trained))
    axes.set(
        xlabel="routed experts for each token in evaluation",
        ylabel="test loss (nats per byte)",
        title="Fewer experts after training",
    )
    axes.legend(fontsize=8)


CLAIM = Claim(
    name="fine_grained",
    title="Many narrow experts and a shared one beat few wide ones",
    statement=STATEMENT.strip(),
    sides=sides,
    findings=findings,
    table=table,
    draw=draw,
)
