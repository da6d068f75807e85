"""Rows of results: what names them, and the file that keeps them as they come."""

import json
import pathlib
from collections.abc import Iterable
from typing import Any

from moe_jax.analysis.benchmark.cases import Pass, Shape, Skew

Row = dict[str, Any]
_CASE = ("tokens", "width", "experts", "k", "skew", "mode")


def case_of(shape: Shape, skew: Skew, which: Pass) -> Row:
    """The keys and values that name a case, in every row of a layer."""
    values = (shape.tokens, shape.width, shape.experts, shape.k, str(skew), str(which))
    return dict(zip(_CASE, values, strict=True))


def key_of(row: Row) -> tuple[Any, ...]:
    """Which measurement of a layer a row is of; the same for a row that says why there is none."""
    return (row.get("part"), row["variant"], *(row[name] for name in _CASE))


def name_of(row: Row) -> str:
    """Which measurement a row is of, in words: its variant, if it has one, and its case."""
    case = ", ".join(f"{name} {row[name]}" for name in _CASE[:-2])
    names = [row["variant"]] if "variant" in row else []
    return ", ".join([*names, case, row["skew"], row["mode"]])


def read(log: pathlib.Path) -> list[Row]:
    """Rows of a .jsonl file, without a last line that a kill cut off; none if there is no file."""
    text = log.read_text() if log.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def as_line(row: Row) -> str:
    """A row of a .jsonl file."""
    return json.dumps(row) + "\n"


def as_json(rows: Iterable[Row]) -> str:
    """A JSON list with one row per line."""
    return "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"
