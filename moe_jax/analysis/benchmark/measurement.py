"""Rows of the benchmark: each layer's time relative to the floors, and where the time goes.

Axis letters: T tokens, K choices per token, N = T * K assignments, S tokens per group, E experts,
d width, f expert width.
"""

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.analysis.benchmark import cases
from moe_jax.analysis.benchmark.cases import Pass, Shape, Skew
from moe_jax.analysis.benchmark.rows import Row, case_of
from moe_jax.analysis.benchmark.timing import (
    Limits,
    Rounds,
    TimedProgram,
    TooExpensive,
    interleaved,
    ratio_quartiles,
)
from moe_jax.analysis.benchmark.variants import (
    BALANCED,
    DENSE,
    VARIANTS,
    Layer,
    balanced_floor,
    dense_floor,
    route,
    statistics_of,
)
from moe_jax.analysis.floors import dense

Calls = dict[str, Callable[[], Any]]
# Hidden units of the experts in the layer whose time is taken for everything but their products.
NARROW = 8


def compute_dtype() -> Any:
    """float32 on CPUs, which gain nothing from bfloat16; bfloat16 elsewhere."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def measure(
    shape: Shape,
    which: Pass,
    names: Mapping[Skew, Sequence[str]],
    limits: Limits,
    schedule: Rounds,
) -> Iterator[Row]:
    """Measures layers and floors; compiles each program once for all skews.

    Args:
      shape: of the layers.
      which: forward, or forward and backward.
      names: of `VARIANTS`, by skew.
      limits: that a layer must not exceed.
      schedule: how often programs run.

    Yields:
      One row per skew and floor or layer; of a layer beyond the limits, only the case, `variant` and
      `left_out`, which says why.
    """
    parameters = cases.parameters(shape, jax.random.key(0))
    floors = _floors(shape, which, parameters)
    programs = {name: program for name, (program, *_) in floors.items()}
    example = _tokens(shape, Skew.UNIFORM, parameters)
    wanted = dict.fromkeys(name for of_skew in names.values() for name in of_skew)

    def compile_layer(name: str) -> TimedProgram | TooExpensive:
        try:
            return TimedProgram.of(VARIANTS[name](shape), which, parameters, example, limits)
        except TooExpensive as reason:
            return reason

    left_out = {}
    for name, result in zip(wanted, _in_threads(compile_layer, wanted), strict=True):
        if isinstance(result, TimedProgram):
            programs[name] = result
        else:
            left_out[name] = str(result)
    for skew, of_skew in names.items():
        case = case_of(shape, skew, which)
        x = _tokens(shape, skew, parameters)
        calls: Calls = {
            name: functools.partial(program, *arguments)
            for name, (program, *arguments) in floors.items()
        }
        for name in of_skew:
            if name in left_out:
                yield {"variant": name, **case, "left_out": left_out[name]}
            else:
                calls[name] = functools.partial(programs[name], parameters, x)
        # The first call of each, which touches its memory for the first time, is not timed.
        statistics = {name: jax.device_get(call()[1]) for name, call in calls.items()}
        times = interleaved(calls, schedule)
        for name in calls:
            yield {
                "variant": name,
                **case,
                **_results(times, name),
                "teraflops_per_second": _flops(shape, which) / np.nanmedian(times[name]) / 1e12,
                "temp_bytes": programs[name].temp_bytes,
                **_routing(statistics[name]),
                "dtype": jnp.dtype(compute_dtype()).name,
            }


def _floors(
    shape: Shape, which: Pass, parameters: Any
) -> dict[str, tuple[TimedProgram, Any, jax.Array]]:
    """Name -> (program, its parameters, its rows). Random rows: products do not look at values."""
    weights = {name: parameters[name] for name in ("w_in", "w_out")}
    first = jax.tree.map(lambda a: a[0], weights)
    key = jax.random.key(2)
    rows = jax.random.normal(key, (shape.assignments, shape.width), compute_dtype())
    by_expert = rows.reshape(shape.experts, shape.rows_per_expert, shape.width)
    floors: dict[str, tuple[Layer, Any, jax.Array]] = {
        DENSE: (dense_floor, first, rows),
        BALANCED: (balanced_floor, weights, by_expert),
    }

    def compile_floor(name: str) -> tuple[TimedProgram, Any, jax.Array]:
        floor, its_parameters, its_rows = floors[name]
        return TimedProgram.of(floor, which, its_parameters, its_rows), its_parameters, its_rows

    return dict(zip(floors, _in_threads(compile_floor, floors), strict=True))


def _tokens(shape: Shape, skew: Skew, parameters: Any) -> jax.Array:
    """[T, d] in the compute dtype."""
    weights = parameters["router"]["weights"]
    return cases.tokens(shape, skew, weights, jax.random.key(1)).astype(compute_dtype())


def _flops(shape: Shape, which: Pass) -> float:
    """What the chosen experts' products take, the same for every layer."""
    forward = dense.flops(shape.assignments, shape.width, shape.mlp_width)
    return forward if which == Pass.FORWARD else 3 * forward


def _results(times: Mapping[str, np.ndarray], name: str) -> Row:
    lower, median, upper = ratio_quartiles(times[name], times[BALANCED])
    return {
        "ratio_to_dense": ratio_quartiles(times[name], times[DENSE])[1],
        "ratio_to_balanced": median,
        "ratio_to_balanced_quartiles": [lower, upper],
        "milliseconds": 1e3 * float(np.nanmedian(times[name])),
        "rounds": int(np.isfinite(times[name]).sum()),
    }


def _routing(statistics: Mapping[str, Any]) -> Row:
    """Fraction of the assignments without a slot, and the load; None for floors, which have no router."""
    names = ("dropped", "max_over_mean_load")
    return {name: float(statistics[name]) if statistics else None for name in names}


PARTS = ("router", "statistics", "dispatch_and_combine", "expert_products")


def measure_parts(
    shape: Shape, which: Pass, names: Sequence[str], schedule: Rounds
) -> Iterator[Row]:
    """Where the time of layers goes, under uniform routing.

    Three programs beside the layer tell its parts: the router with its priority order; the same
    with the statistics; and the layer with experts of `NARROW` hidden units, which is everything but
    the expert products. The latter still reads every row once for them, so the share of dispatch and
    combine is, if anything, too large. Differences of noisy times can be below 0.

    Args:
      shape: of the layers.
      which: forward, or forward and backward.
      names: of `VARIANTS`.
      schedule: how often programs run.

    Yields:
      For each layer, one row per part of `PARTS`: `variant`, the case, `part`, `share` of the
      layer's time and `milliseconds`.
    """
    parameters: Any = cases.parameters(shape, jax.random.key(0))
    router = parameters["router"]
    narrow = {
        "router": router,
        "w_in": parameters["w_in"][:, :, :NARROW],
        "w_out": parameters["w_out"][:, :NARROW],
    }
    x = _tokens(shape, Skew.UNIFORM, parameters)
    programs: dict[str, tuple[Layer, Any]] = {
        "router": (_router(shape, with_statistics=False), router),
        "router and statistics": (_router(shape, with_statistics=True), router),
    }
    for name in names:
        layer = VARIANTS[name](shape)
        programs[name] = layer, parameters
        programs[f"{name} narrow"] = layer, narrow

    def compile_call(program: tuple[Layer, Any]) -> Callable[[], Any]:
        layer, its_parameters = program
        return functools.partial(
            TimedProgram.of(layer, which, its_parameters, x), its_parameters, x
        )

    calls: Calls = dict(zip(programs, _in_threads(compile_call, programs.values()), strict=True))
    for call in calls.values():
        jax.block_until_ready(call())
    times = interleaved(calls, schedule)
    for name in names:
        seconds = {
            "router": times["router"],
            "statistics": times["router and statistics"] - times["router"],
            "dispatch_and_combine": times[f"{name} narrow"] - times["router and statistics"],
            "expert_products": times[name] - times[f"{name} narrow"],
        }
        for part in PARTS:
            yield {
                "variant": name,
                **case_of(shape, Skew.UNIFORM, which),
                "part": part,
                "share": float(np.nanmedian(seconds[part] / times[name])),
                "milliseconds": 1e3 * float(np.nanmedian(seconds[part])),
            }


def _in_threads(function: Callable[[Any], Any], arguments: Iterable[Any]) -> list[Any]:
    """Compiles several programs at once, because XLA compiles each in one thread on CPUs."""
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(threads.map(function, arguments))


def _router(shape: Shape, with_statistics: bool) -> Layer:
    """The router as if it were a layer whose output are the gates [T, K]."""

    def layer(parameters: Any, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        routing = route(shape, parameters, x)
        assignment: Any = routing.assignment
        aside = {"experts": assignment.experts, "slots": assignment.position_in_expert}
        return assignment.gates, aside | (statistics_of(routing) if with_statistics else {})

    return layer
