"""Rows of results: what names them, and the file that keeps them as they come."""

import json
import logging
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moe_jax.analysis.benchmark.cases import Pass, Shape, Skew

_LOG = logging.getLogger(__name__)

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


def of_origin(rows: Sequence[Row], origin: Mapping[str, Any]) -> list[Row]:
    """The rows that have all values of `origin`; the others are counted in the log."""
    own = [row for row in rows if all(row.get(key) == value for key, value in origin.items())]
    if len(own) < len(rows):
        _LOG.info(
            "%d of %d earlier rows are set aside, because their %s is another one",
            len(rows) - len(own), len(rows), " or ".join(origin),
        )  # fmt: skip
    return own


def as_line(row: Row) -> str:
    """A row of a .jsonl file."""
    return json.dumps(row) + "\n"


def as_json(rows: Iterable[Row]) -> str:
    """A JSON list with one row per line."""
    return "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"
