"""Puts a report among the project's results, and its verdicts into the README."""

import pathlib
import re
import shutil

from moe_jax.errors import UserError
from moe_jax.reproduction import report

FOLDER = pathlib.Path("docs/results/claims")
"""From the root of the project; it has a folder for each profile."""

_BETWEEN_MARKERS = re.compile(r"(<!-- verdicts -->\n).*(<!-- end of verdicts -->)", re.DOTALL)


def publish(output: pathlib.Path, root: pathlib.Path) -> pathlib.Path:
    """Copies a report into the project and writes the README's tables anew.

    Claims that the report lacks keep what the project has of them.

    Args:
      output: folder of the report.
      root: of the project.

    Returns:
      Where the report is now.

    Raises:
      UserError: the folder has no report.
    """
    records = report.read_records(output)
    if not records:
        raise UserError(
            f"report={output} has no claim's JSON file; experiments/reproduce.py makes it."
        )
    profiles = sorted({record["profile"] for record in records})
    if len(profiles) > 1:
        raise UserError(
            f"report={output} has claims of the profiles {', '.join(profiles)}; publish the report of "
            "one profile at a time."
        )
    folder = root / FOLDER / profiles[0]
    folder.mkdir(parents=True, exist_ok=True)
    for record in records:
        for kind in ("json", "png"):
            shutil.copy(_own_file(output / f"{record['name']}.{kind}"), folder)
    report.write_reports(folder)
    readme = root / "README.md"
    readme.write_text(with_verdicts(readme.read_text(), root))
    return folder


def _own_file(path: pathlib.Path) -> pathlib.Path:
    """The file itself, not one elsewhere on the machine that it points to."""
    if path.is_symlink() or not path.is_file():
        raise UserError(
            f"{path} is no file of the report, which needs a JSON file and a picture of each claim; "
            "experiments/reproduce.py makes both."
        )
    return path


def with_verdicts(readme: str, root: pathlib.Path) -> str:
    """The README with the verdicts of the project's reports between its markers."""
    tables = "\n".join(_verdicts(folder, root) for folder in sorted((root / FOLDER).iterdir()))
    return _BETWEEN_MARKERS.sub(lambda found: f"{found[1]}{tables}{found[2]}", readme)


def _verdicts(folder: pathlib.Path, root: pathlib.Path) -> str:
    """A sentence and a table of one profile."""
    records = report.read_records(folder)
    link = str((folder / "report.md").relative_to(root))
    hardware = ", ".join(sorted({report.one_line(record["hardware"]) for record in records}))
    minutes = sum(report.minutes(record) for record in records)
    return (
        f"Profile `{folder.name}`, {hardware}, at most {minutes / 60:.1f} hours (runs that claims share "
        f"are counted for each): [report]({link})\n\n{report.verdict_table(records, link)}\n"
    )
