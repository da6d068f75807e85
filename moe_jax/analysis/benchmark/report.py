"""Tables of the benchmark, in Markdown.

Axis letters: T tokens, K choices per token, N = T * K assignments, E experts.
"""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from moe_jax.analysis.benchmark.cases import Pass, Skew
from moe_jax.analysis.benchmark.measurement import PARTS
from moe_jax.analysis.benchmark.products import LARGEST_ERROR
from moe_jax.analysis.benchmark.rows import Row, key_of, name_of
from moe_jax.analysis.benchmark.variants import DENSE, VARIANTS

# Bands of N / E: from, and below.
BANDS = {"N/E >= 200": (200, np.inf), "N/E 40 to 200": (40, 200), "N/E < 40": (0, 40)}
ENOUGH_ROWS = BANDS["N/E >= 200"][0]
# What the project wants on CPUs, forward and backward: (what, variant, skew, largest ratio to the
# balanced floor), and experts -> how many times faster than lax.ragged_dot dropless is to be.
RATIO_GOALS = (
    ("gather at capacity factor 1.0, uniform", "gather_cf1.0", Skew.UNIFORM, 1.08),
    ("dropless, uniform", "dropless", Skew.UNIFORM, 1.25),
    ("dropless, Zipf 1.5", "dropless", Skew.ZIPF, 1.5),
)
SPEED_GOALS = {8: 8.0, 64: 30.0}


def layers_page(rows: Sequence[Row]) -> str:
    """Medians over shapes, goals, parts, memory, every case, and what was left out."""
    measured = [row for row in rows if "ratio_to_balanced" in row]
    left_out = [row for row in rows if "left_out" in row]
    backward = [row for row in measured if row["mode"] == Pass.FORWARD_BACKWARD]
    sections = [
        ("Time relative to the balanced floor, median over shapes", _medians(measured)),
        ("Goals, forward and backward", _goals(backward, left_out)),
        ("Shares of the layer's time", _parts([row for row in rows if "part" in row])),
        (
            "Temporary memory in MB, forward and backward",
            _by_case([row for row in backward if row["skew"] == Skew.UNIFORM], _megabytes),
        ),
        ("Time relative to the balanced floor", _by_case(measured, _ratio)),
        (
            "Left out",
            _left_out((name_of(row), row["left_out"]) for row in left_out),
        ),
    ]
    return "\n".join(f"**{title}**\n\n{text}" for title, text in sections if text)


def products_page(rows: Sequence[Row]) -> str:
    """One line per product and operation, one column per backend, in TFLOP/s."""
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        if "left_out" not in row:
            name = f"{row['model']}, {row['skew']}, {row['operation']}"
            lines.setdefault(name, {})[row["backend"]] = _product_cell(row)
    backends = dict.fromkeys(backend for cells in lines.values() for backend in cells)
    text = "**TFLOP/s, and the best backend's time by this one's**\n\n"
    text += _table("product", list(backends), lines)
    left_out = _left_out((row["backend"], row["left_out"]) for row in rows if "left_out" in row)
    return f"{text}\n**Left out**\n\n{left_out}" if left_out else text


def steps_page(rows: Sequence[Row]) -> str:
    """One line per decoder, one column per program: milliseconds, and the time by the bare program's."""
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        if "left_out" not in row:
            experts = f"{row['experts']} experts" if row["experts"] else "dense"
            line = lines.setdefault(f"width {row['width']}, {experts}", {})
            line[row["program"]] = f"{row['milliseconds']:.0f} ({row['ratio_to_bare']:.2f})"
    programs = dict.fromkeys(program for cells in lines.values() for program in cells)
    sizes = rows[0]
    text = (
        f"**One training step of {sizes['tokens']:,} tokens in rows of {sizes['length']}: milliseconds, and "
        "the time by that of the bare program**\n\n"
    )
    text += _table("decoder", list(programs), lines)
    left_out = _left_out((row["program"], row["left_out"]) for row in rows if "left_out" in row)
    return f"{text}\n**Left out**\n\n{left_out}" if left_out else text


def _product_cell(row: Row) -> str:
    speed, error = f"{row['teraflops_per_second']:.3g}", row["relative_error"]
    if error is None:
        return f"{speed} (wrong: not finite)"
    if error > LARGEST_ERROR:
        return f"{speed} (wrong: error {error:.1%})"
    return f"{speed} ({row['share_of_best']:.2f})"


def _medians(rows: Sequence[Row]) -> str:
    lines = {}
    for skew in Skew:
        for which in Pass:
            for band, (least, below) in BANDS.items():
                own = [
                    row
                    for row in rows
                    if (row["skew"], row["mode"]) == (skew, which)
                    and least <= _rows_per_expert(row) < below
                ]
                lines[f"{skew}, {which}, {band}"] = {
                    name: f"{np.median([r['ratio_to_balanced'] for r in own if r['variant'] == name]):.2f}"
                    for name in dict.fromkeys(row["variant"] for row in own)
                }
    return _layers_table("routing", lines)


def _by_case(rows: Sequence[Row], cell: Callable[[Row], str]) -> str:
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        case = name_of({name: value for name, value in row.items() if name != "variant"})
        lines.setdefault(case, {})[row["variant"]] = cell(row)
    return _layers_table("case", lines)


def _ratio(row: Row) -> str:
    return f"{row['ratio_to_balanced']:.2f}"


def _megabytes(row: Row) -> str:
    return f"{row['temp_bytes'] / 1e6:.0f}"


def _rows_per_expert(row: Row) -> float:
    return row["tokens"] * row["k"] / row["experts"]


def _goals(rows: Sequence[Row], left_out: Sequence[Row]) -> str:
    """Each goal, also those of which nothing was measured."""
    lines = {}
    for what, variant, skew, goal in RATIO_GOALS:
        ratios = [
            row["ratio_to_balanced"]
            for row in rows
            if (row["variant"], row["skew"]) == (variant, skew)
            and _rows_per_expert(row) >= ENOUGH_ROWS
        ]
        name = f"{what}, N/E >= {ENOUGH_ROWS}: time / balanced"
        lines[name] = {"goal": f"<= {goal}"} | _verdict(ratios, ".2f", operator.le, goal)
    for experts, goal in SPEED_GOALS.items():
        cases = [row for row in rows if row["experts"] == experts and row["skew"] == Skew.UNIFORM]
        enough = [row for row in cases if _rows_per_expert(row) >= ENOUGH_ROWS]
        speed_ups, band = speed_ups_over_ragged_dot(enough), f">= {ENOUGH_ROWS}"
        if not speed_ups and (speed_ups := speed_ups_over_ragged_dot(cases)):
            band = f"< {ENOUGH_ROWS}"
        name = f"lax.ragged_dot's time / dropless's, {experts} experts, uniform, N/E {band}"
        result = _verdict(speed_ups, ".1f", operator.ge, goal)
        reasons = [
            row["left_out"]
            for row in left_out
            if (row["variant"], row["experts"], row["mode"])
            == ("ragged_dot", experts, Pass.FORWARD_BACKWARD)
        ]
        if not speed_ups and reasons:
            result["measured"] += f": ragged_dot {reasons[0]}"
        lines[name] = {"goal": f">= {goal:g}"} | result
    return _table("", ["goal", "measured", ""], lines)


def _verdict(
    values: Sequence[float],
    precision: str,
    reaches: Callable[[float, float], bool],
    goal: float,
) -> dict[str, str]:
    """Cells for the median of the values."""
    if not values:
        return {"measured": "not measured"}
    median = float(np.median(values))
    verdict = "reached" if reaches(median, goal) else "missed"
    return {"measured": format(median, precision), "": verdict}


def speed_ups_over_ragged_dot(rows: Sequence[Row]) -> list[float]:
    """ragged_dot's ratio by dropless's, in every case that has both."""
    ratios = {key_of(row): row["ratio_to_balanced"] for row in rows}
    return [
        ratio / ratios[(part, "dropless", *case)]
        for (part, variant, *case), ratio in ratios.items()
        if variant == "ragged_dot" and (part, "dropless", *case) in ratios
    ]


def _parts(rows: Sequence[Row]) -> str:
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        lines.setdefault(name_of(row), {})[row["part"]] = f"{row['share']:.1%}"
    return _table("layer", PARTS, lines)


def _left_out(reasons: Iterable[tuple[str, str]]) -> str:
    return "".join(f"- {name}: {reason}\n" for name, reason in dict.fromkeys(reasons))


def _layers_table(first: str, lines: Mapping[str, Mapping[str, str]]) -> str:
    present = {name for cells in lines.values() for name in cells}
    return _table(first, [name for name in (DENSE, *VARIANTS) if name in present], lines)


def _table(first: str, columns: Sequence[str], lines: Mapping[str, Mapping[str, str]]) -> str:
    """Markdown; nothing of lines without cells, and nothing at all if there are none with."""
    filled = {name: cells for name, cells in lines.items() if cells}
    if not filled:
        return ""
    text = f"| {first} | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}\n"
    for name, cells in filled.items():
        text += f"| {name} | {' | '.join(cells.get(column, '') for column in columns)} |\n"
    return text
