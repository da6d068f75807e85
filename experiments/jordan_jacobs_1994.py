"""A hierarchy of experts against backpropagation on a robot arm: Jordan and Jacobs (1994), Table 1.

    python experiments/jordan_jacobs_1994.py --seeds=3 --workdir=runs/jordan_jacobs_1994

The forward dynamics of a simulated arm of four joints (moe_jax/data/robot_arm.py says what had to be
assumed) are learned by a linear fit, a network of 60 logistic hidden units (1,024 parameters) trained
by backpropagation, and a binary tree of 16 linear experts (1,027 parameters, and 64 standard
deviations) trained by EM with IRLS in the gates (Algorithm 1), by EM with least squares in the gates
(Algorithm 2), and by gradient ascent on the same likelihood.

Protocol, fixed before the runs: all epochs are passes over the whole training set. Gradients go with
momentum 0.9; the rate is the one of the grid with the lowest training error of seed 0 after a tenth
of the epochs, network and tree alike. A method has converged at the first epoch at which its training
error is within 2% of the lowest of the run, and is judged there by its relative error on the test
rows: the mean over the joints of squared error over variance.
"""

import functools
import json
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from tqdm import tqdm

from moe_jax import command_line
from moe_jax.analysis import mixture_figures
from moe_jax.data.robot_arm import RobotArm
from moe_jax.data.tables import Table
from moe_jax.errors import UserError
from moe_jax.models.abstract_model import AbstractModel, arrays_of
from moe_jax.models.mixtures import em, tree
from moe_jax.models.mixtures.backpropagation import BackpropagationConfig
from moe_jax.models.mixtures.em import GateFit
from moe_jax.models.mixtures.mixture import MixtureConfig, MixtureOutput
from moe_jax.models.mixtures.objectives import Objective, errors, squared_errors
from moe_jax.training import provenance

LEARNING_RATES = (0.01, 0.03, 0.1, 0.3)
MOMENTUM = 0.9
EM_EPOCHS = 60
WITHIN = 1.02
"""A converged run's training error, as a multiple of its lowest."""
_BETWEEN_RECORDS = 10

PUBLISHED = {
    "linear": (0.31, 1),
    "backpropagation": (0.09, 5500),
    "HME, EM (Algorithm 1)": (0.10, 35),
    "HME, EM (Algorithm 2)": (0.12, 39),
    "CART": (0.17, None),
    "CART, linear leaves": (0.13, None),
    "MARS": (0.16, None),
}
"""Relative error and epochs of the paper's Table 1."""

_CONFIG = command_line.define_config()
_CONFIG_FILE = "configs/jordan_jacobs_1994.py:hme"
_SEEDS = flags.DEFINE_integer("seeds", 3, "Runs of each method.")
_GRADIENT_EPOCHS = flags.DEFINE_integer("gradient_epochs", 2000, "Of the gradient methods.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/jordan_jacobs_1994", "Folder of the results.")
_FORMAT = flags.DEFINE_enum("format", "table", ["table", "json"], "What is printed.")

Model = MixtureConfig | BackpropagationConfig

Curve = dict[str, list[float]]
"""`epochs`, and the relative errors `train` and `test` at each."""


def relative_error(outputs: jax.typing.ArrayLike, targets: jax.typing.ArrayLike) -> jax.Array:
    """Mean over the m targets of mean squared error over variance: two [B, m] to []."""
    squared = (jnp.asarray(outputs) - jnp.asarray(targets)) ** 2
    return (squared.mean(axis=0) / jnp.var(jnp.asarray(targets), axis=0)).mean()


def linear(tables: dict[str, Table]) -> Curve:
    """Ordinary least squares, with which one epoch is enough."""

    def ones(table: Table) -> np.ndarray:
        return np.concatenate([table.inputs, np.ones((len(table.inputs), 1))], axis=1)

    train, test = tables["train"], tables["test"]
    weights = np.linalg.lstsq(ones(train), train.targets.astype(np.float64), rcond=None)[0]
    return {
        "epochs": [1],
        "train": [float(relative_error(ones(train) @ weights, train.targets))],
        "test": [float(relative_error(ones(test) @ weights, test.targets))],
    }


def expectation_maximization(
    config: MixtureConfig, tables: dict[str, Table], gate_fit: GateFit, seed: int
) -> Curve:
    """EM in float64, because normal equations square the condition number."""
    with jax.enable_x64(True):
        (inputs, targets), test = (
            (jnp.asarray(table.inputs, jnp.float64), jnp.asarray(table.targets, jnp.float64))
            for table in (tables["train"], tables["test"])
        )
        start = config.build(jax.random.key(seed)).tree
        numbers = jax.tree.map(lambda array: array.astype(jnp.float64), start)
        step = _em_epoch(gate_fit)
        curve: Curve = {"epochs": [], "train": [], "test": []}
        for epoch in tqdm(range(1, EM_EPOCHS + 1), desc=f"EM {gate_fit.value}", leave=False):
            numbers = step(numbers, inputs, targets)
            curve["epochs"].append(epoch)
            curve["train"].append(float(_tree_error(numbers, inputs, targets)))
            curve["test"].append(float(_tree_error(numbers, *test)))
    return curve


@functools.cache
def _em_epoch(gate_fit: GateFit) -> Callable[..., tree.Tree]:
    return jax.jit(lambda n, x, y: em.em_step(n, x, y, gate_fit)[0])


@jax.jit
def _tree_error(numbers: tree.Tree, inputs: jax.Array, targets: jax.Array) -> jax.Array:
    return relative_error(tree.predict(numbers, inputs), targets)


class GradientDescent:
    """Descent with momentum over all rows, in float32.

    A tree descends its negative log-likelihood, a network its squared error.
    """

    def __init__(self, config: Model, tables: dict[str, Table]) -> None:
        self._config, abstract_model = config, AbstractModel.of(config)
        (inputs, targets), test = (
            (jnp.asarray(table.inputs), jnp.asarray(table.targets))
            for table in (tables["train"], tables["test"])
        )
        self._momentum = optax.trace(MOMENTUM)

        def error(parameters: Any) -> jax.Array:
            output = abstract_model.merge(parameters)(inputs)
            if isinstance(output, MixtureOutput):
                return errors(Objective.COMPETITIVE, output, targets).mean()
            return squared_errors(output, targets).mean()

        def relative(parameters: Any, inputs: jax.Array, targets: jax.Array) -> jax.Array:
            output = abstract_model.merge(parameters)(inputs)
            blended = output.blended if isinstance(output, MixtureOutput) else output
            return relative_error(blended, targets)

        def epochs(state: tuple[Any, Any], rate: jax.Array) -> tuple[tuple[Any, Any], Any]:
            def epoch(_: int, state: tuple[Any, Any]) -> tuple[Any, Any]:
                parameters, memory = state
                steps, memory = self._momentum.update(jax.grad(error)(parameters), memory)
                return jax.tree.map(lambda p, s: p - rate * s, parameters, steps), memory

            state = jax.lax.fori_loop(0, _BETWEEN_RECORDS, epoch, state)
            return state, (relative(state[0], inputs, targets), relative(state[0], *test))

        self._epochs = jax.jit(epochs)

    def __call__(self, rate: float, seed: int, epochs: int) -> Curve:
        """One run."""
        parameters = arrays_of(self._config.build(jax.random.key(seed)))[0]
        state = parameters, self._momentum.init(parameters)
        curve: Curve = {"epochs": [], "train": [], "test": []}
        for record in tqdm(range(epochs // _BETWEEN_RECORDS), desc=f"rate {rate:g}", leave=False):
            state, (train, test) = self._epochs(state, rate)
            curve["epochs"].append((record + 1) * _BETWEEN_RECORDS)
            curve["train"].append(float(train))
            curve["test"].append(float(test))
        return curve

    def choose_rate(self, epochs: int) -> tuple[float, dict[str, float]]:
        """The rate with the lowest training error of seed 0 after a tenth of the epochs, and all."""
        short = max(epochs // 10, _BETWEEN_RECORDS)
        last = {rate: self(rate, 0, short)["train"][-1] for rate in LEARNING_RATES}
        finite = [rate for rate in LEARNING_RATES if np.isfinite(last[rate])]
        return min(finite, key=last.__getitem__), {f"{r:g}": error for r, error in last.items()}


def converged(curve: Curve) -> tuple[float, float]:
    """The epoch at which a run has converged, and its relative error on the test rows there."""
    train = np.array(curve["train"])
    place = int((train <= WITHIN * np.nanmin(train)).argmax())
    return curve["epochs"][place], curve["test"][place]


def row(method: str, curves: list[Curve], **more: Any) -> dict[str, Any]:
    """A row of the table: mean and standard deviation over the seeds."""
    epochs, test = np.array([converged(curve) for curve in curves]).T
    spread = {"ddof": 1} if len(curves) > 1 else {}
    return {
        "method": method,
        "relative_error": float(test.mean()),
        "relative_error_sd": float(test.std(**spread)),
        "epochs": float(epochs.mean()),
        "epochs_sd": float(epochs.std(**spread)),
        "published": PUBLISHED.get(method),
        "curves": curves,
        **more,
    }


def markdown(result: dict[str, Any]) -> str:
    """The table and where it comes from."""
    lines = [
        "| method | relative error | epochs | paper: error | epochs | time per run |",
        "|---|---|---|---|---|---|",
    ]
    for entry in result["rows"]:
        error, epochs = entry["published"] or ("not printed", "")
        cells = [
            entry["method"],
            f"{entry['relative_error']:.3f} ± {entry['relative_error_sd']:.3f}",
            f"{entry['epochs']:.0f} ± {entry['epochs_sd']:.0f}",
            f"{error:.2f}" if isinstance(error, float) else error,
            f"{epochs}",
            f"{entry['seconds'] / max(len(entry['curves']), 1):.1f} s",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    for name in ("CART", "CART, linear leaves", "MARS"):
        lines.append(f"| {name} | not run here | | {PUBLISHED[name][0]} | | |")
    lines += [
        "",
        f"**{result['verdict']}**",
        "",
        "Mean ± standard deviation over seeds "
        f"{list(range(result['seeds']))}; epochs until the training error is within 2% of the run's "
        f"lowest, out of {EM_EPOCHS} of EM and {result['gradient_epochs']} of gradients (momentum "
        f"{MOMENTUM:g}, rates {list(LEARNING_RATES)} tried on both sides, chosen "
        f"{result['rates']}). Simulated arm, sha256 {result['dataset_sha256'][:12]}: the paper's own "
        "is not printed, so its errors can be compared in order, not in size. "
        f"{result['hardware']}, {result['seconds']:.0f} s, commit {str(result['commit'])[:12]}.",
        "",
        f"`{result['command']}`",
        "",
    ]
    return "\n".join(lines)


def epochs_to_reach(curve: Curve, error: float) -> float:
    """The first epoch at which the relative error on the test rows is no more than `error`."""
    return next(
        (at for at, test in zip(curve["epochs"], curve["test"], strict=True) if test <= error),
        math.inf,
    )


def verdict(rows: dict[str, dict[str, Any]]) -> str:
    """How many epochs EM saves, and whether the tree's or the network's error is lower."""
    tree_row, network = rows["HME, EM (Algorithm 1)"], rows["backpropagation"]
    to_same = np.mean([epochs_to_reach(c, tree_row["relative_error"]) for c in network["curves"]])
    gap = network["relative_error"] - tree_row["relative_error"]
    deviations = [entry["relative_error_sd"] for entry in (tree_row, network)]
    error = math.hypot(*deviations) / math.sqrt(len(tree_row["curves"]))
    better = "not resolved"
    if abs(gap) > 2 * error:
        better = "lower with the tree" if gap > 0 else "lower with the network"
    limit = network["curves"][0]["epochs"][-1]
    still_falling = ""
    if network["epochs"] > 0.9 * limit:
        still_falling = f"; backpropagation was still improving when it ended after {limit} epochs"
    return (
        f"To convergence backpropagation takes {network['epochs'] / tree_row['epochs']:.0f} times the "
        f"epochs of EM (paper: {5500 / 35:.0f} times), and to the tree's error "
        f"{to_same / tree_row['epochs']:.1f} times; error at convergence: {better} (difference "
        f"{gap:+.3f}, standard error {error:.3f}; paper: -0.01){still_falling}."
    )


def main() -> None:
    """Runs every method, then writes the table, the numbers and the picture."""
    for name, value, least in (
        ("seeds", _SEEDS.value, 2),
        ("gradient_epochs", _GRADIENT_EPOCHS.value, _BETWEEN_RECORDS),
    ):
        if value < least:
            raise UserError(f"--{name} is {value}; it must be at least {least}.")
    start = time.perf_counter()
    config = command_line.experiment(_CONFIG.value)
    config.validate()
    hierarchy, data = config.model, config.data
    if not isinstance(hierarchy, MixtureConfig) or not isinstance(data, RobotArm):
        raise UserError(
            f"--config has the model {type(hierarchy).__name__} and the data {type(data).__name__}; "
            f"use MixtureConfig and RobotArm, as in {_CONFIG_FILE}."
        )
    tables = data.tables()
    seeds, rates, rows = range(_SEEDS.value), {}, []

    def timed(method: str, run: Callable[[], list[Curve]]) -> None:
        began = time.perf_counter()
        curves = run()
        rows.append(row(method, curves, seconds=time.perf_counter() - began))

    timed("linear", lambda: [linear(tables)])
    for method, gate_fit in (
        ("HME, EM (Algorithm 1)", GateFit.IRLS),
        ("HME, EM (Algorithm 2)", GateFit.LEAST_SQUARES),
    ):
        em_of_seed = functools.partial(expectation_maximization, hierarchy, tables, gate_fit)
        timed(
            method, functools.partial(lambda run: [run(seed) for seed in tqdm(seeds)], em_of_seed)
        )
    network = BackpropagationConfig(
        hierarchy.num_inputs, num_hidden=60, num_outputs=hierarchy.num_outputs
    )
    models: dict[str, Model] = {"backpropagation": network, "HME, gradient": hierarchy}
    for method, model in models.items():
        descent = GradientDescent(model, tables)
        rates[method], errors_by_rate = descent.choose_rate(_GRADIENT_EPOCHS.value)
        run = functools.partial(descent, rates[method], epochs=_GRADIENT_EPOCHS.value)
        timed(method, functools.partial(lambda run: [run(seed) for seed in tqdm(seeds)], run))
        rows[-1]["training_error_by_rate"] = errors_by_rate
    result = {
        "rows": rows,
        "verdict": verdict({entry["method"]: entry for entry in rows}),
        "rates": rates,
        "seeds": _SEEDS.value,
        "gradient_epochs": _GRADIENT_EPOCHS.value,
        "dataset_sha256": tables["train"].sha256,
        "command": f"python experiments/jordan_jacobs_1994.py --seeds={_SEEDS.value} "
        f"--gradient_epochs={_GRADIENT_EPOCHS.value}",
        "commit": provenance.commit(),
        "hardware": provenance.machine(),
        "seconds": time.perf_counter() - start,
    }
    folder = pathlib.Path(_WORKDIR.value)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jordan_jacobs_1994.json").write_text(json.dumps(result) + "\n")
    (folder / "jordan_jacobs_1994.md").write_text(markdown(result))
    mixture_figures.save_convergence(
        {entry["method"]: entry["curves"] for entry in rows if len(entry["curves"]) > 1},
        {"linear fit": rows[0]["relative_error"]},
        "Robot arm: relative error on the test rows",
        folder / "jordan_jacobs_1994.png",
    )
    print(json.dumps(result) if _FORMAT.value == "json" else markdown(result))


if __name__ == "__main__":
    command_line.run(main, _CONFIG_FILE)
