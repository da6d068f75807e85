"""Tiny runs with a planted effect: verdicts, a suite that is killed, a run that fails."""

import json
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from tests.scripts import environment

ROOT = pathlib.Path(__file__).parents[2]


def start(data_dir: str, workdir: pathlib.Path) -> subprocess.Popen:
    own = environment() | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(ROOT / "tests/reproduction/planted.py"), data_dir, str(workdir)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=own, stdout=pipe, stderr=pipe, text=True)


def finished_runs(workdir: pathlib.Path) -> dict[pathlib.Path, int]:
    """metrics.jsonl of each run that was measured, with the time of its last change."""
    runs = [path.parents[1] for path in workdir.glob("runs/*/measured/test.json")]
    return {run: (run / "metrics.jsonl").stat().st_mtime_ns for run in runs}


@pytest.fixture(scope="module")
def suites(data_dir, tmp_path_factory):
    """A suite that is killed after its first finished run, then one that goes on."""
    workdir = tmp_path_factory.mktemp("suite")
    killed = start(data_dir, workdir)
    deadline = time.time() + 300
    while not finished_runs(workdir) and time.time() < deadline:
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.1)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    before = finished_runs(workdir)
    continued = start(data_dir, workdir)
    out, err = continued.communicate(timeout=500)
    assert continued.returncode == 0, err
    return workdir, before, out, err


def test_verdicts(suites):
    workdir, *_ = suites
    record = json.loads((workdir / "report/planted.json").read_text())
    found = {finding["statement"]: finding["verdict"] for finding in record["findings"]}
    assert found == {
        "planted": "reproduced", "reversed": "contradicted", "null": "not resolved"
    }  # fmt: skip
    assert record["verdict"] == "contradicted"


def test_the_better_learning_rate_is_chosen(suites):
    workdir, *_ = suites
    record = json.loads((workdir / "report/planted.json").read_text())
    side = next(side for side in record["sides"] if side["name"] == "learns")
    grid = side["validation_loss_by_learning_rate"]
    assert side["learning_rate"] == 1e-2
    assert grid["0.01"] < grid["0.0001"]


def test_finished_runs_are_not_repeated(suites):
    workdir, before, *_ = suites
    after = finished_runs(workdir)
    assert before and before.items() <= after.items()
    assert len(after) == 6


def test_no_run_is_left_over_or_damaged_by_the_kill(suites):
    workdir, *_ = suites
    for path in workdir.glob("runs/*/metrics.jsonl"):
        steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
        assert steps == sorted(set(steps)), path


def test_a_failing_run_is_named_and_stops_no_other(suites):
    workdir, _, out, err = suites
    assert out.splitlines() == ["broken: unknown data, rate 0.01, seed 0"]
    assert "failed: broken: unknown data" in err
    assert [path.stem for path in (workdir / "report").glob("*.json")] == ["planted"]


def test_the_report_has_everything(suites):
    workdir, *_ = suites
    markdown = (workdir / "report/report.md").read_text()
    for part in (
        "**Contradicted.** By: ",
        "| steps |",
        "trained with commit 0123, judged with commit 4567+changes",
        "![Learning",
        "planted.png",
        "python_library",
        "0.0001, 0.01",
    ):
        assert part in markdown, part
    html = (workdir / "report/report.html").read_text()
    assert 'src="data:image/png;base64,' in html
    assert "<table>" in html and 'src="planted.png"' not in html
    assert 'href="#learning-lowers-the-loss"' in html and 'id="learning-lowers-the-loss"' in html
