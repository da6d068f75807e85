"""Metrics of a run: one JSON object per logged step in metrics.jsonl, and TensorBoard events."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from moe_jax.layers.moe import MoEReport
from moe_jax.training.storage import appender, event_writer

METRICS_FILE = "metrics.jsonl"

Record = dict[str, Any]


class MetricsWriter:
    """Appends records; a resumed run first removes those it is going to repeat."""

    def __init__(self, workdir: epath.PathLike, step: int) -> None:
        """Opens the files.

        Args:
          workdir: the run's folder.
          step: last step that is kept; records after it are removed.
        """
        path = epath.Path(workdir) / METRICS_FILE
        kept = [record for record in read(workdir) if record["step"] <= step]
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
        self._events.close()


def _null_if_not_finite(value: Any) -> Any:
    """JSON has no NaN; a skipped step may have one."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read(workdir: epath.PathLike) -> list[Record]:
    """The records of a run in order of steps; a last line cut short by a kill is left out."""
    path = epath.Path(workdir) / METRICS_FILE
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


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
