"""The launchers: what they say exists; signals and statuses; one rehearsed to the end of a run."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest

from configs.quickstart import get_config as quickstart
from moe_jax.training import metrics
from tests.experiments import fake_slurm

ROOT = pathlib.Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "launch").iterdir())
DOCUMENT = ROOT / "docs" / "pods_launch.md"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_bash_accepts_the_script(path):
    assert path.stat().st_mode & 0o100, "cannot be executed"
    assert "\nset -euo pipefail\n" in path.read_text()
    subprocess.run(["bash", "-n", path], check=True)


def flags_of_trainer(text: str) -> set[str]:
    """What stands behind train.py, or what passes its flags on, to the end of the command."""
    commands = text.replace("\\\n", " ").splitlines()
    passed_on = r"(?:train\.py|on_host\.sh|tpu_pod\.sh|xpk\.sh|slurm\.sbatch|printf '%q ')"
    tails = [tail for line in commands for tail in re.split(passed_on, line)[1:]]
    return {flag for tail in tails for flag in re.findall(r"--(\w+)\b(?!-)", tail)}


def flags_that_exist() -> set[str]:
    train = (ROOT / "moe_jax" / "commands" / "train.py").read_text()
    return {"config", *re.findall(r'DEFINE_\w+\(\s*"(\w+)"', train)}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_gives_the_trainer_flags_that_exist(path):
    used = flags_of_trainer(path.read_text())
    assert {"config", "workdir"} <= used <= flags_that_exist()


def test_the_document_names_flags_that_exist():
    text = DOCUMENT.read_text()
    used = set(re.findall(r"--(\w+)\b(?!-)", text)) - {
        "nodes",
        "logdir",
        "memory_fraction",
        "search",
        "signal",
    }  # Others'.
    assert flags_of_trainer(text) <= used == used & flags_that_exist()
    for field in set(re.findall(r"--config\.([\w.]+)=?", text)):
        node = quickstart()
        for name in field.split("."):
            node = getattr(node, name)


@pytest.mark.parametrize("path", [*SCRIPTS, DOCUMENT], ids=lambda path: path.name)
def test_files_that_are_named_exist(path):
    named = re.findall(r"\b((?:configs|launch|experiments|docs)/[\w/]+\.\w+)", path.read_text())
    assert named
    for name in named:
        assert (ROOT / name).exists(), name


_PYTHON = """#!/usr/bin/env bash
# Stands for Python: prints flags, or trains until SIGTERM or until it ends with $STATUS.
if [ "$1" = -m ]; then echo "--flag_of=$3"; exit; fi
echo "$LIBTPU_INIT_ARGS$XLA_FLAGS|$*"
trap 'trap "" TERM; echo saving; sleep 0.5; echo saved; exit 143' TERM
[ -n "$STATUS" ] && exit "$STATUS"
echo ready
while true; do sleep 0.05; done
"""


@pytest.fixture
def start(tmp_path):
    """Starts a script with a Python that does not train; gives STATUS to it."""
    fake_slurm.install(tmp_path)
    python = tmp_path / "python"
    python.write_text(_PYTHON)
    python.chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(python), "SLURM_NTASKS": "1",
        "SLURM_JOB_ID": "17", "WORKDIR": "/shared/run", "CONFIG": "c.py", "MACHINE": "gpu-h100-8",
    }  # fmt: skip
    started = []

    def start(command: list[str], status: int | None = None, **variables: str) -> subprocess.Popen:
        given = "" if status is None else str(status)
        process = subprocess.Popen(
            ["bash", *command], cwd=ROOT, env={**environment, "STATUS": given, **variables},
            stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


ON_HOST = ["launch/on_host.sh", "tpu-v5p-8", "--config=c.py", "--workdir=w", "--steps=3"]
SLURM = ["launch/slurm.sbatch", "--steps=3"]


def test_a_host_trains_with_the_flags_of_its_machine(start):
    out, _ = start(ON_HOST, status=0, LIBTPU_INIT_ARGS="--mine=1").communicate(timeout=60)
    # One's own come last, so that they win.
    assert out == (
        "--flag_of=tpu-v5p-8 --mine=1|experiments/train.py --distributed --config=c.py --workdir=w --steps=3\n"
    )


def test_a_slurm_job_trains_with_the_flags_of_its_machine(start, tmp_path):
    process = start(SLURM, status=0, XLA_FLAGS="--mine=1")
    out, _ = process.communicate(timeout=60)
    assert out == (
        "--flag_of=gpu-h100-8 --mine=1|experiments/train.py --distributed --config=c.py "
        "--workdir=/shared/run --steps=3\n"
    )
    assert process.returncode == 0 and not (tmp_path / "requeued").exists()


@pytest.mark.parametrize("command", [ON_HOST, SLURM], ids=["host", "slurm"])
def test_a_signal_is_passed_on_and_the_checkpoint_is_waited_for(start, tmp_path, command):
    process = start(command)
    while "ready" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "saving\n"
    process.send_signal(signal.SIGTERM)  # Slurm and Kubernetes may send it again.
    out, _ = process.communicate(timeout=60)
    assert out == "saved\n" and process.returncode == 143
    assert (tmp_path / "requeued").exists() == (command == SLURM)


def test_a_slurm_job_that_was_stopped_too_often_does_not_look_done(start, tmp_path):
    process = start(SLURM, SLURM_RESTART_COUNT="50")
    while "ready" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert not (tmp_path / "requeued").exists()


@pytest.mark.parametrize(
    ("status", "starts", "requeued"),
    [(134, "0", True), (134, "50", False), (143, "0", True), (2, "0", False), (0, "0", False)],
    ids=["a task died", "too often", "preempted", "user error", "done"],
)
def test_a_slurm_job_is_repeated_where_that_may_help(start, tmp_path, status, starts, requeued):
    process = start(SLURM, status=status, SLURM_RESTART_COUNT=starts)
    process.communicate(timeout=60)
    assert process.returncode == status
    assert (tmp_path / "requeued").exists() == requeued


@pytest.mark.parametrize("status", [0, 2, 134, 143])
def test_a_host_ends_with_the_status_of_the_trainer(start, status):
    process = start(ON_HOST, status=status)
    process.communicate(timeout=60)
    assert process.returncode == status


_GCLOUD = """#!/usr/bin/env bash
# Stands for gcloud with a slice that is there, and for a `sleep` that does not: each `ssh` ends with the
# next of the statuses in the file `statuses`.
case "$0" in */sleep) exit ;; esac
case "$*" in
  *describe*) echo ACTIVE ;;
  *) here="$(dirname "$0")"
    echo "${@: -1}" >> "$here/commands"
    status="$(head -n 1 "$here/statuses")"
    sed -i 1d "$here/statuses"
    exit "$status" ;;
esac
"""


@pytest.mark.parametrize(
    ("statuses", "status", "trained"),
    [([1, 0, 134, 0, 0], 0, 2), ([0, 2], 2, 1), ([0, 143, 0, 143], 143, 2)],
    ids=["refused and died, then done", "user error", "too often"],
)
def test_a_tpu_slice_is_asked_again_where_that_may_help(start, tmp_path, statuses, status, trained):
    for name in ("gcloud", "sleep"):
        (tmp_path / name).write_text(_GCLOUD)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "statuses").write_text("".join(f"{number}\n" for number in statuses))
    process = start(
        ["launch/tpu_pod.sh"],
        REPOSITORY="https://example.org/a.git",
        COMMIT="c",
        MACHINE="tpu-v5e-8",
        ATTEMPTS="2" if status == 143 else "20",
    )
    process.communicate(timeout=60)
    assert process.returncode == status
    assert (tmp_path / "statuses").read_text() == ""
    commands = (tmp_path / "commands").read_text()
    assert commands.count("moe_jax/launch/on_host.sh tpu-v5e-8 --config=c.py") == trained
    # PYTHON is that of the environment that the installation makes.
    assert commands.count("PYTHON=.venv-python3.11/bin/python moe_jax/launch") == trained
    assert "make install EXTRA=tpu PYTHON=python3.11" in commands


def free_job_number() -> int:
    """Of which JAX makes a port that is free: 61440 and the number's last 12 bits."""
    for number in range(2**12):
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", 61440 + number)):
                return number
    raise AssertionError("every port is taken")


@pytest.fixture
def slurm(tmp_path, data_dir):
    """Starts launch/slurm.sbatch with a number of processes, as Slurm would."""
    fake_slurm.install(tmp_path)
    started = []

    def start(tasks: int) -> subprocess.Popen[str]:
        environment = {
            name: value for name, value in os.environ.items() if "proxy" not in name.lower()
        }
        environment |= {
            "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": sys.executable,
            "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "SLURM_JOB_ID": str(free_job_number()), "SLURM_NTASKS": str(tasks),
            "CONFIG": "tests/training/one_block.py", "WORKDIR": str(tmp_path / "run"),
        }  # fmt: skip
        flags = [
            "--steps=12", f"--config.data.data_dir={data_dir}", "--config.checkpoint.every=20",
        ]  # fmt: skip
        process = subprocess.Popen(
            ["bash", "launch/slurm.sbatch", *flags], cwd=ROOT, env=environment,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.slow  # Six processes, each of which imports and compiles: 100 s on one core.
def test_a_signal_puts_the_job_back_into_the_queue_and_it_ends_with_more_processes(slurm, tmp_path):
    first = slurm(tasks=2)
    while not metrics.read(tmp_path / "run") and first.poll() is None:
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    _, errors = first.communicate(timeout=120)
    assert first.returncode == 143, errors
    stopped = re.search(r"stopped at step (\d+) of 12 and saved", errors)
    assert stopped, errors
    assert (tmp_path / "requeued").read_text().startswith("requeue ")

    (tmp_path / "requeued").unlink()
    second = slurm(tasks=4)
    _, errors = second.communicate(timeout=120)
    assert second.returncode == 0, errors
    assert f"Continuing from step {stopped[1]} on 8 x cpu (cpu) of 4 processes" in errors
    assert [record["step"] for record in metrics.read(tmp_path / "run")] == list(range(1, 13))
    assert not (tmp_path / "requeued").exists()
