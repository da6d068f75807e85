"""report.html in a browser: no script runs, whatever a claim's record says; pictures are shown."""

import json
import pathlib
import shutil

import pytest

from moe_jax.reproduction import publication, report

ROOT = pathlib.Path(__file__).parents[2]
CPU = ROOT / publication.FOLDER / "cpu"
HOSTILE = (
    "</td></p></title><script>document.title='taken'; alert(1)</script>"
    "<img src=x onerror=\"document.title='taken'\"> <svg onload=alert(2)> [x](javascript:alert(3)) "
    "`<script>alert(4)</script>"
)

pytestmark = pytest.mark.browser


def hostile(tree):
    """The record with every text but its names and verdicts followed by a hostile one."""
    if isinstance(tree, dict):
        kept = ("name", "profile", "verdict")
        return {k: v if k in kept and isinstance(v, str) else hostile(v) for k, v in tree.items()}
    if isinstance(tree, list):
        return [hostile(value) for value in tree]
    return tree + HOSTILE if isinstance(tree, str) else tree


def test_no_script_of_a_record_runs(tmp_path, opened):
    record = json.loads((CPU / "capacity.json").read_text())
    (tmp_path / "capacity.json").write_text(json.dumps(hostile(record)))
    shutil.copy(CPU / "capacity.png", tmp_path)
    report.write_reports(tmp_path)
    page = opened(tmp_path / "report.html")
    assert not page.has_dialog()
    assert page.browser.title == "Claims of papers, reproduced"
    assert page.count("script") == page.count("svg") == page.count("a[href^='javascript']") == 0
    assert page.count("table") == 4 and page.errors() == []


def test_the_committed_report_is_shown_without_errors(opened):
    page = opened(CPU / "report.html")
    assert page.errors() == []
    assert page.count("h2") == len(list(CPU.glob("*.json")))
    widths = page.browser.execute_script(
        "return Array.from(document.images).map(image => image.naturalWidth)"
    )
    assert len(widths) == page.count("h2") and min(widths) > 100
