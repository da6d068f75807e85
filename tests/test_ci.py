""".ci/run with a `make` that does nothing: which Pythons it takes, and what its ledger says."""

import os
import pathlib
import shutil
import stat
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def program(path: pathlib.Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def run(tmp_path):
    """Runs the script in a folder where `make test` took Python 3.11; `make FAILING` fails."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci" / "run")
    program(tmp_path / "bin" / "make", 'echo "made $*"; [ "$1" != "$FAILING" ]')
    program(tmp_path / ".venv" / "bin" / "python", "echo 3.11")
    versions = tmp_path / "pyenv" / "versions"
    for version, path in {
        "3.9": versions / "3.9.1/bin/python3.9",
        "3.11": versions / "3.11.7/bin/python3.11",
        "3.12": versions / "3.12.1/bin/python3.12",
        "3.13": tmp_path / "bin" / "python3.13",
    }.items():
        program(path, f'echo "{version} $3"' if version != "3.9" else "exit 0")
    program(versions / "3.12.9/bin/python3.12", "exit 1")  # Does not start.
    program(versions / "3.13.5/bin/python3.13-config", "echo 3.13 wrong")
    environment = {
        "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin",
        "PYENV_ROOT": str(tmp_path / "pyenv"),
        "HOME": str(tmp_path),
    }

    def start(failing: str = "", **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [tmp_path / ".ci" / "run"],
            env=environment | {"FAILING": failing} | more,
            capture_output=True,
            text=True,
            cwd=os.sep,
        )

    return start


def test_each_further_python_is_tested_once_and_the_ledger_names_every_part(run, tmp_path):
    done = run()
    assert done.returncode == 0, done.stderr
    fast = [line for line in done.stdout.splitlines() if line.startswith("made test-fast")]
    assert f"made test-fast PYTHON={tmp_path}/pyenv/versions/3.12.1/bin/python3.12" in fast
    assert f"made test-fast PYTHON={tmp_path}/bin/python3.13" in fast
    # What the machine has besides in /usr/bin comes on top, but no version twice and not 3.11.
    versions = [line.rpartition("python")[2] for line in fast]
    assert len(set(versions)) == len(versions) and not {"3.9", "3.11"} & set(versions)
    ledger = done.stdout.partition("== Minutes\n")[2].splitlines()
    assert ledger[0].split() == ["test", "0.0", "of", "12", "min", "ok"]
    assert [line.split()[0] for line in ledger[-5:]] == ["gpu", "pods", "browser", "wheel", "total"]


def test_gpus_are_compiled_for_with_each_locked_jax_once(run, tmp_path):
    made = [line for line in run().stdout.splitlines() if line.startswith("made test-gpu")]
    # The second is the first Python after 3.11.
    assert made[0] == "made test-gpu"
    assert made[1:] == [f"made test-gpu PYTHON={tmp_path}/pyenv/versions/3.12.1/bin/python3.12"]


def test_the_ledger_is_printed_when_a_part_fails_and_nothing_runs_after_it(run):
    done = run(failing="test-fast")
    assert done.returncode == 1
    ledger = done.stdout.partition("== Minutes\n")[2].splitlines()
    assert len(ledger) == 3 and ledger[1].endswith("FAILED") and ledger[2].startswith("total")
    assert "test-pods" not in done.stdout


def test_too_many_minutes_are_a_failure(run, tmp_path):
    script = tmp_path / ".ci" / "run"
    script.write_text(script.read_text().replace("limit=60", "limit=-1"))
    done = run()
    assert done.returncode == 1 and "in more than -1 minutes" in done.stdout
