"""Metrics of a run: one JSON object per logged step in metrics.jsonl, and TensorBoard events."""

import json
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from moe_jax.layers.moe import MoEReport
from moe_jax.training.storage import appender, event_writer

_LOG = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
DAMAGED_FILE = "metrics_damaged.txt"

Record = dict[str, Any]


class MetricsWriter:
    """Appends records; a resumed run first removes those it is going to repeat."""

    def __init__(self, workdir: epath.PathLike, step: int) -> None:
        """Opens the files.

        A line that is no record loses itself only: it is named, and kept in metrics_damaged.txt.

        Args:
          workdir: the run's folder.
          step: last step that is kept; records after it are removed.
        """
        path = epath.Path(workdir) / METRICS_FILE
        if step and not path.exists():
            _LOG.warning("%s is gone, so that the run has no records up to step %d.", path, step)
        lines = _lines(workdir)
        _keep_damaged(epath.Path(workdir), lines, step)
        kept = [line.record for line in lines if line.record and line.record["step"] <= step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
        temporary.replace(path)
        self._records = appender(path)
        self._events = event_writer(workdir, step)

    def write(self, record: Record) -> None:
        """Writes one step's record to disk before it returns."""
        record = {name: _null_if_not_finite(value) for name, value in record.items()}
        self._records.append(json.dumps(record) + "\n")
        for name, value in record.items():
            if name != "step" and isinstance(value, (int, float)):
                self._events.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Closes both files."""
        self._records.close()
        try:
            self._events.close()
        except OSError as error:  # Not to hide what stopped the run; the records have it all.
            _LOG.warning("TensorBoard's events could not be written: %s", error.strerror)


def _null_if_not_finite(value: Any) -> Any:
    """JSON has no NaN; a skipped step may have one, also in a list such as the experts' load."""
    if isinstance(value, list):
        return [_null_if_not_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read(workdir: epath.PathLike) -> list[Record]:
    """The records of a run in order of steps; lines that are none are left out."""
    return [line.record for line in _lines(workdir) if line.record]


class _Line(NamedTuple):
    """A line of metrics.jsonl.

    Attributes:
      number: from 1.
      content: without its end.
      record: None if the line is none.
      whole: False for the last one where its end is missing.
    """

    number: int
    content: bytes
    record: Record | None
    whole: bool


def _lines(workdir: epath.PathLike) -> list[_Line]:
    path = epath.Path(workdir) / METRICS_FILE
    if not path.exists():
        return []
    contents = path.read_bytes().split(b"\n")
    return [
        _Line(number, content, _record(content), number < len(contents))
        for number, content in enumerate(contents, 1)
        if content.strip()
    ]


def _record(line: bytes) -> Record | None:
    """What a line says; None if that is no record of a step."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # No JSON, or no UTF-8.
        return None
    is_record = isinstance(record, dict) and type(record.get("step")) is int
    return record if is_record else None


def _keep_damaged(workdir: epath.Path, lines: Sequence[_Line], step: int) -> None:
    """Says which lines are no records, and copies them to where the next start leaves them alone."""
    damaged = [line for line in lines if not line.record and not _cut_by_a_kill(line, step)]
    if not damaged:
        return
    notes = []
    for line in damaged:
        before = max((r["step"] for n, _, r, _ in lines if r and n < line.number), default=0)
        after = min((r["step"] for n, _, r, _ in lines if r and n > line.number), default=None)
        gap = f"after step {before}" + ("" if after is None else f" and before step {after}")
        _LOG.warning(
            "%s: line %d, %s, is damaged and no record; it is kept in %s.",
            *(workdir / METRICS_FILE, line.number, gap, DAMAGED_FILE),
        )
        notes.append(
            f"line {line.number}, {gap}: {line.content.decode(errors='backslashreplace')}\n"
        )
    path = workdir / DAMAGED_FILE
    known = path.read_text() if path.exists() else ""
    # A start that was killed before it wrote metrics.jsonl has kept them already.
    path.write_text(known + "".join(note for note in notes if note not in known))


def _cut_by_a_kill(line: _Line, step: int) -> bool:
    """Whether a line is the beginning of a record that the run is about to repeat."""
    begins = re.match(rb'\{"step": (\d+),', line.content)
    return not line.whole and (begins is None or int(begins[1]) > step)


def training_record(metrics: Mapping[str, Any], moe_layers: Sequence[int | str]) -> Record:
    """Flattens a step's metrics.

    Args:
      metrics: of a step of the loop, on the host; `router` is a list of MoEReports, each with a leading
        axis over MoE layers, empty for a dense model.
      moe_layers: name of each MoE layer.

    Returns:
      `train/...` scalars and `router/<layer>/...` scalars; `router/<layer>/load` is a list of E.
    """
    record: Record = {
        f"train/{name}": float(value)
        for name, value in metrics.items()
        if name not in ("router", "finite", "signal")
    }
    for layer, values in zip(moe_layers, _by_layer(metrics["router"]), strict=True):
        for name, value in values.items():
            record[f"router/{layer}/{name}"] = np.asarray(value, np.float64).tolist()
    return record


def _by_layer(reports: Sequence[MoEReport]) -> Iterator[dict[str, jax.Array]]:
    """Losses and statistics of each MoE layer in turn."""
    for report in reports:
        values = {**{f"{name}_loss": v for name, v in report.losses.items()}, **report.statistics}
        for i in range(len(values["load"])):
            yield {name: value[i] for name, value in values.items()}


def dropped_fraction(record: Record) -> float:
    """Mean over MoE layers of the fraction of assignments that no expert served; 0 for dense models.

    They found no slot, or were lost on the way to a dropless layer's device whose buffer was full.
    """
    dropped, lost = (
        [v for name, v in record.items() if name.endswith(end)] for end in ("/dropped", "/overflow")
    )
    return float(np.sum(dropped + lost) / len(dropped)) if dropped else 0.0


def held_out_table(measured: Mapping[str, float], of_text: bool) -> str:
    """A line for each domain, a column for each metric.

    Args:
      measured: `eval/<metric>` and `eval/<metric>/<domain>`, `loss` among them.
      of_text: the loss is in nats per token, and is shown in bits too.
    """
    columns: dict[str, dict[str, float]] = {}
    for name, value in measured.items():
        metric, _, domain = name.removeprefix("eval/").partition("/")
        columns.setdefault(metric, {})[domain or "all"] = value
    if of_text:
        nats = columns.pop("loss")
        bits = {domain: loss / math.log(2) for domain, loss in nats.items()}
        columns = {"nats/token": nats, "bits/token": bits, **columns}
    lines = [f"{'':24}" + "".join(f"{metric:>12}" for metric in columns)]
    for domain in next(iter(columns.values())):
        cells = [column.get(domain) for column in columns.values()]
        shown = ["" if value is None else f"{value:.4f}" for value in cells]
        lines.append(f"{domain:24}" + "".join(f"{cell:>12}" for cell in shown))
    return "\n".join(lines)
