"""Reports of claims: a JSON file and a picture of each, report.md and report.html of all of them."""

import base64
import dataclasses
import json
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markdown_it import MarkdownIt
from matplotlib.figure import Figure

from moe_jax.errors import UserError
from moe_jax.reproduction import verdicts
from moe_jax.reproduction.claim import Claim
from moe_jax.reproduction.results import Results, SideResult
from moe_jax.reproduction.runs import write_json
from moe_jax.reproduction.verdicts import Verdict, describe

# What a claim's record must have.
_FIELDS = (
    "name", "profile", "title", "statement", "verdict", "findings", "table", "sides", "command",
    "hardware", "processes", "commits", "judged_by", "datasets",
)  # fmt: skip

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-size: 0.9rem; display: block; overflow-x: auto; }
td, th { border: 1px solid #ccc; padding: 0.25rem 0.6rem; text-align: left; vertical-align: top; }
img { max-width: 100%; } code { background: #f3f3f3; }
"""


@dataclasses.dataclass(frozen=True)
class Conditions:
    """Under which the runs were made.

    Attributes:
      profile: what they were sized for.
      hardware: in words.
      processes: that worked at the same time.
      commits: of the code that the runs were trained with.
      judged_by: commit of the code that made findings and verdict of them.
      datasets: name and sha256 of each.
    """

    profile: str
    hardware: str
    processes: int
    commits: Sequence[str]
    judged_by: str
    datasets: Sequence[str]


def write_claim(
    claim: Claim, results: Results, conditions: Conditions, output: pathlib.Path
) -> dict[str, Any]:
    """Judges a finished claim and writes `<name>.json` and `<name>.png`.

    Returns:
      What the JSON file says.
    """
    findings = claim.findings(results)
    table = claim.table(results)
    record = {
        "name": claim.name,
        "title": claim.title,
        "statement": claim.statement,
        "verdict": verdicts.overall(findings),
        "findings": [dataclasses.asdict(finding) for finding in findings],
        "table": {"columns": list(table.columns), "rows": [list(row) for row in table.rows]},
        "sides": [_side(side) for side in results.sides.values()],
        "command": f"python experiments/reproduce.py --claim={claim.name} "
        f"--profile={conditions.profile}",
        **dataclasses.asdict(conditions),
    }
    output.mkdir(parents=True, exist_ok=True)
    figure = Figure(layout="constrained")
    claim.draw(results, figure)
    figure.savefig(output / f"{claim.name}.png", dpi=120)
    write_json(output / f"{claim.name}.json", record)
    return record


def write_reports(output: pathlib.Path) -> list[dict[str, Any]]:
    """Writes report.md and report.html of all claims whose JSON files are in a folder.

    Returns:
      The claims' records by name.
    """
    records = read_records(output)
    try:
        parts = [verdict_table(records), *map(_section, records)]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"a claim's record in {output} has a value of another kind than experiments/reproduce.py "
            f"writes ({type(error).__name__}: {error}); make it anew."
        ) from error
    markdown = "\n\n".join(["# Claims of papers, reproduced", *parts])
    (output / "report.md").write_text(markdown + "\n")
    (output / "report.html").write_text(_html(markdown, output))
    return records


def read_records(output: pathlib.Path) -> list[dict[str, Any]]:
    """The records of the claims whose JSON files are in a folder, by name.

    The files may be a stranger's: their names become paths, so they must be names.

    Raises:
      UserError: a file is no claim's record.
    """
    return [_read_record(path) for path in sorted(output.glob("*.json"))]


def _read_record(path: pathlib.Path) -> dict[str, Any]:
    remedy = "name the folder of a report that experiments/reproduce.py wrote."
    try:
        record = json.loads(path.read_text())
        problem = next((name for name in _FIELDS if name not in record), None)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is no claim's record ({error}); {remedy}") from error
    if problem:
        raise UserError(f"{path} is no claim's record, because it has no {problem!r}; {remedy}")
    for name in ("name", "profile"):
        value = record[name]
        if not isinstance(value, str) or not re.fullmatch(r"\w+", value):
            raise UserError(
                f"{path}: {name} is {value!r}, which is no name of letters, digits and underscores; "
                f"{remedy}"
            )
    return record


def minutes(record: Mapping[str, Any]) -> float:
    """That a claim's runs take, those at rates that were not chosen included."""
    seconds = sum(side["seconds_with_rates_not_chosen"] for side in record["sides"])
    return seconds / 60 / record["processes"]


def verdict_table(records: Sequence[Mapping[str, Any]], link: str = "") -> str:
    """A row for each claim with its verdict, in Markdown.

    Args:
      records: of the claims.
      link: file that the claims are described in, empty for this one.
    """
    lines = ["| claim | verdict | findings |", "|---|---|---|"]
    for record in records:
        decisive = _counts(f for f in record["findings"] if f["decisive"])
        aside = _counts(f for f in record["findings"] if not f["decisive"])
        shown = f"{decisive}; aside: {aside}" if aside else decisive
        title = f"[{one_line(record['title'])}]({link}#{_anchor(record['title'])})"
        lines.append(f"| {title} | **{one_line(record['verdict'])}** | {shown} |")
    return "\n".join(lines)


def _counts(findings: Iterable[Mapping[str, Any]]) -> str:
    """How many findings have each verdict, such as '2 reproduced, 1 not resolved'."""
    found = [finding["verdict"] for finding in findings]
    counts = {verdict: found.count(verdict) for verdict in Verdict}
    return ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)


def _side(result: SideResult) -> dict[str, Any]:
    """What the report says of a side; infinite losses are null."""
    return {
        "name": result.side.name,
        "config": result.side.described(),
        "steps": result.config.steps,
        "seeds": list(result.side.seeds),
        "learning_rate": result.learning_rate,
        "validation_loss_by_learning_rate": {
            f"{rate:g}": _finite(loss) for rate, loss in result.validation.items()
        },
        "test_loss": [_finite(loss) for loss in result.test_losses],
        "diverged": sum(run.diverged_at is not None for run in result.runs),
        "parameters": result.parameters,
        "algorithmic_flops": result.algorithmic_flops,
        "executed_flops": result.executed_flops,
        "seconds": [round(run.seconds, 1) for run in result.runs],
        "seconds_with_rates_not_chosen": round(result.seconds, 1),
    }


def _finite(value: float) -> float | None:
    return value if abs(value) < float("inf") else None


def _section(record: Mapping[str, Any]) -> str:
    """Of one claim, in Markdown."""
    parts = [
        f"## {one_line(record['title'])}",
        _verdict(record),
        _text(record["statement"]),
        f"![{one_line(record['title'])}]({record['name']}.png)",
        _findings(record["findings"]),
        "Paper's figures beside ours:",
        _table(record["table"]["columns"], record["table"]["rows"]),
    ]
    if record["sides"]:
        parts += ["Runs:", _sides(record["sides"])]
    parts.append(_provenance(record))
    return "\n\n".join(parts)


def _verdict(record: Mapping[str, Any]) -> str:
    """In words, with the findings that contradict."""
    verdict = f"**{one_line(record['verdict']).capitalize()}.**"
    contradicted = [
        f'"{one_line(finding["statement"])}"'
        for finding in record["findings"]
        if finding["decisive"] and finding["verdict"] == Verdict.CONTRADICTED
    ]
    return f"{verdict} By: {'; '.join(contradicted)}." if contradicted else verdict


def _findings(findings: Sequence[Mapping[str, str]]) -> str:
    rows = [
        [
            f["statement"],
            f["paper"],
            f["ours"],
            f"**{f['verdict']}**" + ("" if f["decisive"] else " (aside)"),
            f["needs"],
        ]
        for f in findings
    ]
    return _table(["statement", "paper", "here", "verdict", "would be resolved by"], rows)


def _sides(sides: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for side in sides:
        losses = [float("inf") if loss is None else loss for loss in side["test_loss"]]
        grid = side["validation_loss_by_learning_rate"]
        tried = f"{side['learning_rate']:g}" + (f" of {', '.join(grid)}" if grid else "")
        rows.append([
            side["name"], describe(losses), tried, f"{side['steps']:,}",
            f"{side['parameters'] / 1e6:.2f} M",
            f"{side['algorithmic_flops'] / 1e12:.2f}", f"{side['executed_flops'] / 1e12:.2f}",
            f"{sum(side['seconds']) / len(side['seconds']):.0f} s", _code(side["config"]),
        ])  # fmt: skip
    columns = [
        "side", "test loss", "learning rate", "steps", "parameters", "algorithmic TFLOPs of a run",
        "executed TFLOPs", "time of a run", "config",
    ]  # fmt: skip
    return _table(columns, rows)


def _provenance(record: Mapping[str, Any]) -> str:
    seeds = sorted({seed for side in record["sides"] for seed in side["seeds"]})
    of_runs = (
        f"Seeds {', '.join(map(str, seeds))}; with the rates that were not chosen, the runs take "
        f"{minutes(record):.0f} minutes, {record['processes']} at a time; "
        if seeds
        else ""
    )
    data = f"; {', '.join(map(one_line, record['datasets']))}" if record["datasets"] else ""
    trained = f"trained with commit {', '.join(map(_short, record['commits']))}, " if seeds else ""
    return (
        f"{of_runs}{one_line(record['hardware'])}; {trained}judged with commit "
        f"{_short(record['judged_by'])}{data}.\n\nAlone: {_code(record['command'])}"
    )


def _short(commit: str) -> str:
    """The first digits of a commit, and '+changes' if it has that."""
    digits, plus, changes = one_line(commit).partition("+")
    return digits[:12] + plus + changes


def _text(words: str) -> str:
    """Prose without HTML, whoever wrote it; its Markdown stays."""
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", words)


def one_line(words: str) -> str:
    """The same in one line, for titles and cells."""
    return _text(" ".join(words.split()))


def _code(words: str) -> str:
    """As code, which nothing in it can end."""
    return f"`{' '.join(words.replace('`', chr(39)).split())}`"


def _cell(words: str) -> str:
    return one_line(words).replace("|", "\\|")


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(_cell, x)) + " |" for x in lines)


def _anchor(title: str) -> str:
    """Of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def _html(markdown: str, output: pathlib.Path) -> str:
    """One self-contained file: pictures are in it."""
    # Raw HTML of a record would be another's script in our page.
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)

    def embedded(match: re.Match[str]) -> str:
        data = base64.b64encode((output / match[1]).read_bytes()).decode()
        return f'src="data:image/png;base64,{data}"'

    def identified(match: re.Match[str]) -> str:
        return f'<h2 id="{_anchor(re.sub("<[^>]+>", "", match[1]))}">{match[1]}</h2>'

    body = re.sub(r'src="([\w.]+\.png)"', embedded, body)
    body = re.sub(r"<h2>(.*?)</h2>", identified, body)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>Claims of papers, reproduced</title><style>{_STYLE}</style></head>\n"
        f"<body>\n{body}</body></html>\n"
    )
