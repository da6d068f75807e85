"""What a MoE layer costs beside its floors: time relative to the same matrix products, and memory.

    python experiments/bench_layer.py --quick [--format=json] [--output=DIR]
    python experiments/bench_layer.py [--format=json] [--output=DIR]
    python experiments/bench_layer.py --products [--small] [--format=json] [--output=DIR]
    python experiments/bench_layer.py --step [--format=json] [--output=DIR]

The first form measures four shapes in minutes. The second measures the whole grid, which takes hours,
and goes on where it was interrupted when it is given again at the same commit. Every layer is compared with the
dense floor (all assignments through one feed-forward network) and the balanced floor (as many rows for
each expert, no router) in interleaved rounds of one process; a ratio is the median over rounds. The
third form compares the backends of the grouped product at the shapes of published models, the last one
whole training steps on a CPU with a bare program's and, with the extra `parity`, transformers'.
DIR gets the rows (.jsonl as they come, .json), tables (.md) and a picture (.png).
"""

import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence

# PyTorch needs a part of the GPU, which JAX would take whole.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
from absl import flags
from tqdm import tqdm

from moe_jax import command_line
from moe_jax.analysis import figures
from moe_jax.analysis.benchmark import plan, products, report, rows
from moe_jax.analysis.benchmark.cases import Pass, Skew
from moe_jax.analysis.benchmark.rows import Row
from moe_jax.analysis.benchmark.timing import THOROUGH
from moe_jax.errors import UserError
from moe_jax.training import provenance, step_benchmark

_QUICK = flags.DEFINE_bool("quick", False, "Four shapes and the variants that the goals are about.")
_PRODUCTS = flags.DEFINE_bool("products", False, "Compare backends of the grouped product instead.")
_SMALL = flags.DEFINE_bool("small", False, "With --products: shapes that a CPU can compute.")
_STEP = flags.DEFINE_bool("step", False, "Compare whole training steps instead.")
_FORMAT = flags.DEFINE_enum("format", "table", ["table", "json"], "What stdout gets.")
_OUTPUT = flags.DEFINE_string("output", "runs/bench_layer", "Folder of rows, tables and picture.")


def main() -> None:
    """Measures what is missing, then prints and writes rows and tables."""
    if _SMALL.value and not _PRODUCTS.value:
        raise UserError(
            "small is set, but only --products has small shapes; add it or use --quick."
        )
    chosen = [flag.name for flag in (_QUICK, _PRODUCTS, _STEP) if flag.value]
    if len(chosen) > 1:
        raise UserError(
            f"{chosen[0]} and {chosen[1]} are set, which are two benchmarks; leave one out."
        )
    if _STEP.value:
        found = _collect("bench_step", [], lambda _: _measure_steps())
        figures.save_step_benchmark(found, provenance.machine(), _path("bench_step", "png"))
        _present("bench_step", found, report.steps_page)
        return
    if _PRODUCTS.value:
        shapes = products.shapes_for(_SMALL.value)
        found = _collect("products", [], lambda _: _measure_products(shapes))
        _present("products", found, report.products_page)
        return
    name, its_plan = (
        ("bench_layer_quick", plan.QUICK) if _QUICK.value else ("bench_layer", plan.FULL)
    )
    earlier = [] if _QUICK.value else rows.read(_path(name, "jsonl"))
    found = _collect(name, earlier, lambda here: plan.measure_missing(its_plan, here))
    drawn = [row for row in found if row["mode"] == Pass.FORWARD_BACKWARD and "rounds" in row]
    title = f"MoE layer, forward and backward, {drawn[0]['dtype']}\n{provenance.machine()}"
    figures.save_layer_benchmark(drawn, title, _path(name, "png"))
    _present(name, found, report.layers_page)


def _path(name: str, ending: str) -> pathlib.Path:
    folder = pathlib.Path(_OUTPUT.value)
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}.{ending}"


def _collect(
    name: str, earlier: Sequence[Row], measure: Callable[[Sequence[Row]], Iterator[Row]]
) -> list[Row]:
    """Measures, keeping each row at once.

    Args:
      name: of the files.
      earlier: rows that stay in the file; those of another device, jax or commit are not counted as
        measured.
      measure: (rows of this device, jax and commit) -> further rows.

    Returns:
      All rows of this device, jax and commit.
    """
    log, new = _path(name, "jsonl"), _path(name, "jsonl.new")
    new.write_text("".join(rows.as_line(row) for row in earlier))
    new.replace(log)
    origin = {"device": provenance.machine(), "jax": jax.__version__, "commit": provenance.commit()}
    said: set[tuple[str, str]] = set()
    found = rows.of_origin(earlier, origin)
    for row in measure(list(found)):
        if "left_out" in row:
            what = (
                row.get("backend") or row.get("program") or row["variant"],
                row["left_out"],
            )
            if what not in said:
                said.add(what)
                subject = row.get("backend") or row.get("program") or rows.name_of(row)
                tqdm.write(f"left out: {subject}: {row['left_out']}", file=sys.stderr)
        found.append(row | origin)
        with log.open("a") as file:
            file.write(rows.as_line(found[-1]))
    return found


def _present(name: str, found: Sequence[Row], page: Callable[[Sequence[Row]], str]) -> None:
    """Writes tables and rows, and prints what was asked for."""
    commit = re.sub("(?<=^.{12})[0-9a-f]+", "", str(found[0]["commit"]))
    text = f"{page(found)}\n{found[0]['device']}, jax {found[0]['jax']}, commit {commit}.\n"
    _path(name, "md").write_text(text)
    _path(name, "json").write_text(rows.as_json(found))
    measured = [row for row in found if "rounds" in row]
    print(rows.as_json(measured) if _FORMAT.value == "json" else text, end="")
    print(f"rows, tables and picture are in {_path(name, '*')}", file=sys.stderr)


def _measure_products(shapes: Sequence[products.ProductShape]) -> Iterator[Row]:
    with tqdm(total=len(shapes) * len(Skew), unit="product", smoothing=0) as bar:
        for shape in shapes:
            for skew in Skew:
                bar.set_description(f"{shape.model} {skew}")
                yield from products.measure_products(shape, skew, products.BACKENDS, THOROUGH)
                bar.update()


def _measure_steps() -> Iterator[Row]:
    with tqdm(total=len(step_benchmark.SHAPES), unit="shape", smoothing=0) as bar:
        for shape in step_benchmark.SHAPES:
            bar.set_description(f"width {shape.width}, {shape.experts or 'no'} experts")
            yield from step_benchmark.measure_steps(shape, step_benchmark.ROUNDS)
            bar.update()


if __name__ == "__main__":
    command_line.run(main)
