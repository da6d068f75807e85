"""Which layers are measured over which grid, and what of that is still missing.

Axis letters: T tokens, K choices per token, N = T * K assignments, E experts, d width.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from moe_jax.analysis.benchmark.cases import Pass, Shape, Skew
from moe_jax.analysis.benchmark.measurement import PARTS, measure, measure_parts
from moe_jax.analysis.benchmark.rows import Row, case_of, key_of
from moe_jax.analysis.benchmark.timing import THOROUGH, Limits, Rounds
from moe_jax.analysis.benchmark.variants import VARIANTS

# The layers whose time is also told apart by parts.
PARTS_VARIANTS = ("gather_cf1.0", "dropless")


@dataclasses.dataclass(frozen=True)
class BenchmarkPlan:
    """A benchmark.

    Attributes:
      grid: shapes, each measured forward, and forward and backward.
      names: of `variants.VARIANTS`, by skew.
      parts: shapes and passes whose time is told apart by parts.
      flops_limit: of one call; what takes more is left out.
      schedule: how often programs run.
    """

    grid: Sequence[Shape]
    names: Mapping[Skew, Sequence[str]]
    parts: Sequence[tuple[Shape, Pass]]
    flops_limit: float
    schedule: Rounds


# Calls of 10 seconds are left out, on 2 cores. The cheapest shapes come first, so that an
# interrupted grid has the most of them.
FULL = BenchmarkPlan(
    grid=sorted(
        itertools.starmap(
            Shape, itertools.product((2048, 8192), (256, 512), (8, 32, 64, 128), (1, 2, 8))
        ),
        key=lambda shape: shape.assignments * shape.width**2,
    ),
    names=dict.fromkeys(Skew, tuple(VARIANTS)),
    parts=list(
        itertools.product(
            (Shape(2048, 512, 8, 1), Shape(8192, 512, 8, 2), Shape(8192, 512, 64, 2)), Pass
        )
    ),
    flops_limit=1e12,
    schedule=THOROUGH,
)
# N / E is 256 to 2048; few and many experts, one to eight choices, both widths. The variants are those
# that the goals are about, with the routing of the goals; for ragged_dot that is uniform, because XLA
# makes it multiply all rows by all experts on CPUs, so its time knows no skew. The limit leaves its
# backward pass to the first shape.
QUICK = BenchmarkPlan(
    grid=[
        Shape(2048, 256, 8, 2),
        Shape(2048, 512, 8, 1),
        Shape(8192, 256, 32, 1),
        Shape(2048, 256, 8, 8),
    ],
    names={
        Skew.UNIFORM: ("gather_cf1.0", "dropless", "ragged_dot"),
        Skew.ZIPF: ("dropless",),
    },
    parts=[(Shape(2048, 512, 8, 1), Pass.FORWARD_BACKWARD)],
    flops_limit=1.3e11,
    schedule=Rounds(rounds=5, least_rounds=2, seconds=0.3),
)


def measure_missing(plan: BenchmarkPlan, rows: Sequence[Row]) -> Iterator[Row]:
    """Measures, with a progress bar, what `rows` does not have yet.

    Yields:
      As `measurement.measure` and `measurement.measure_parts`.
    """
    done = {key_of(row) for row in rows}
    limits = Limits.of_this_machine(plan.flops_limit)
    layers, parts = missing_layers(plan, done), missing_parts(plan, done)
    total = sum(len(of_skew) for *_, names in layers for of_skew in names.values())
    with tqdm(total=total + len(parts) * len(PARTS_VARIANTS), unit="layer", smoothing=0) as bar:
        for shape, which, names in layers:
            bar.set_description(f"{shape} {which}")
            for row in measure(shape, which, names, limits, plan.schedule):
                yield row
                bar.update(row["variant"] in VARIANTS)
        for shape, which in parts:
            bar.set_description(f"parts of {shape} {which}")
            yield from measure_parts(shape, which, PARTS_VARIANTS, plan.schedule)
            bar.update(len(PARTS_VARIANTS))


def missing_layers(
    plan: BenchmarkPlan, done: set[tuple[Any, ...]]
) -> list[tuple[Shape, Pass, dict[Skew, list[str]]]]:
    """The variants by skew that each shape and pass has no row of; `done` holds keys of rows."""
    missing = []
    for shape, which in itertools.product(plan.grid, Pass):
        names = {
            skew: [
                name
                for name in of_skew
                if key_of({"variant": name, **case_of(shape, skew, which)}) not in done
            ]
            for skew, of_skew in plan.names.items()
        }
        names = {skew: of_skew for skew, of_skew in names.items() if of_skew}
        if names:
            missing.append((shape, which, names))
    return missing


def missing_parts(plan: BenchmarkPlan, done: set[tuple[Any, ...]]) -> list[tuple[Shape, Pass]]:
    """The cases of which some part has no row."""

    def is_done(shape: Shape, which: Pass) -> bool:
        case = case_of(shape, Skew.UNIFORM, which)
        return all(
            key_of({"variant": name, "part": part, **case}) in done
            for name, part in itertools.product(PARTS_VARIANTS, PARTS)
        )

    return [case for case in plan.parts if not is_done(*case)]
