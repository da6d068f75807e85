"""At random moments: processes are killed, a second trainer starts, the folder is removed.

`make test-slow` runs these; with -s each says what it did.
"""

import contextlib
import dataclasses
import os
import pathlib
import random
import shutil
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from moe_jax.training import metrics
from moe_jax.training.checkpoints import Checkpoints
from moe_jax.training.run import Run
from moe_jax.training.run_lock import LOCK_FILE
from tests.training.one_block import get_config

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
KILLS = int(os.environ.get("KILLS", "100"))
STEPS = 9


@dataclasses.dataclass
class Starter:
    """Starts the processes of a run."""

    data_dir: str
    count: int

    def start(self, workdir: pathlib.Path) -> list[subprocess.Popen[str]]:
        environment = {name: x for name, x in os.environ.items() if "proxy" not in name.lower()}
        environment |= {
            "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "PATIENCE_SECONDS": "8",
        }  # fmt: skip
        flags = [
            "--config=tests/training/one_block.py",
            f"--config.data.data_dir={self.data_dir}",
            f"--workdir={workdir}",
        ]
        if self.count > 1:
            with socket.socket() as probe:
                probe.bind(("localhost", 0))
                address = f"localhost:{probe.getsockname()[1]}"
            flags += [f"--coordinator={address}", f"--process_count={self.count}"]
        command = [sys.executable, "tests/training/one_of_several.py", "SIGTERM", "0", *flags]
        return [
            subprocess.Popen(
                [*command, *([f"--process_id={index}"] if self.count > 1 else [])], cwd=ROOT,
                env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            )
            for index in range(self.count)
        ]  # fmt: skip

    def finish(self, workdir: pathlib.Path) -> float:
        """Runs to the end; returns the seconds that it took."""
        begin = time.perf_counter()
        codes, errors = ended(self.start(workdir))
        assert codes == [0] * self.count, errors
        return time.perf_counter() - begin


def ended(processes: list[subprocess.Popen[str]]) -> tuple[list[int], list[str]]:
    """Statuses and stderr, when all have ended."""
    errors = [process.communicate(timeout=300)[1] for process in processes]
    return [process.returncode for process in processes], errors


@pytest.fixture(params=[1, 2], ids=["one process", "two processes"])
def starter(request, data_dir) -> Starter:
    return Starter(data_dir, request.param)


def result(workdir: pathlib.Path, data_dir: str) -> tuple[list[dict], list[np.ndarray]]:
    """Every record without its times, and every array of the last checkpoint."""
    records = [
        {name: value for name, value in record.items() if not name.startswith("time/")}
        for record in metrics.read(workdir)
    ]
    config = get_config()
    config.data.data_dir = data_dir
    run = Run.build(config)
    with jax.set_mesh(run.mesh):
        state = run.restore(Checkpoints(workdir / "checkpoints"), STEPS)
    return records, jax.device_get(jax.tree.leaves(state))


def assert_same(one, other) -> None:
    assert [record["step"] for record in one[0]] == list(range(1, STEPS + 1))
    assert one[0] == other[0]
    for array, expected in zip(one[1], other[1], strict=True):
        np.testing.assert_array_equal(array, expected)


def wait_for_the_lock(workdir: pathlib.Path, processes: list[subprocess.Popen[str]]) -> None:
    """Returns when the processes have begun to work on the folder, or have ended."""
    lock, before = workdir / LOCK_FILE, None
    with contextlib.suppress(OSError):  # Left by those that were killed.
        before = lock.read_text()
    while processes[0].poll() is None:
        with contextlib.suppress(OSError):
            if lock.read_text() not in (before, ""):
                return
        time.sleep(0.01)


def test_random_kills_lose_nothing(starter, tmp_path):
    starter.finish(tmp_path / "reference")  # Compiles.
    reference = result(tmp_path / "reference", starter.data_dir)
    # That may be interrupted, as of the last run that was not; imports come before.
    seconds = 10.0
    draw, kills, runs, begin = random.Random(starter.count), 0, 0, time.perf_counter()
    while kills < KILLS:
        workdir, runs = tmp_path / f"run{runs}", runs + 1
        while kills < KILLS:
            processes = starter.start(workdir)
            wait_for_the_lock(workdir, processes)
            locked = time.perf_counter()
            try:
                processes[0].communicate(timeout=seconds * draw.random())
                assert ended(processes)[0] == [0] * starter.count
                seconds = min(seconds, time.perf_counter() - locked)
                break
            except subprocess.TimeoutExpired:
                # One of them, or all.
                for process in draw.choice([processes, *([process] for process in processes)]):
                    process.kill()
                ended(processes)
                kills += 1
        starter.finish(workdir)
        assert_same(result(workdir, starter.data_dir), reference)
        minutes = (time.perf_counter() - begin) / 60
        print(f"{kills} kills in {runs} runs of {starter.count} process(es), {minutes:.1f} min")


def test_of_two_trainers_one_is_refused_and_nothing_is_lost(starter, tmp_path):
    seconds = starter.finish(tmp_path / "reference")
    reference = result(tmp_path / "reference", starter.data_dir)
    draw, refused = random.Random(starter.count), 0
    for number in range(max(KILLS // 20, 1)):
        workdir = tmp_path / f"run{number}"
        first = starter.start(workdir)
        time.sleep(draw.choice([0.0, 0.8 * seconds * draw.random()]))
        second = starter.start(workdir)
        outcomes = [ended(processes) for processes in (first, second)]
        codes = [codes for codes, _ in outcomes]
        assert [0] * starter.count in codes, outcomes
        for statuses, errors in outcomes:
            if any(statuses):
                assert statuses == [2] * starter.count, outcomes
                assert "is held by process" in errors[0] and "Traceback" not in "".join(errors)
                refused += 1
        assert_same(result(workdir, starter.data_dir), reference)
        assert not (workdir / LOCK_FILE).exists()
    assert refused
    print(f"{refused} of {number + 1} second trainers of {starter.count} process(es) refused")


def test_a_folder_that_is_removed_is_said_and_made_again(starter, tmp_path):
    seconds = starter.finish(tmp_path / "reference")
    reference = result(tmp_path / "reference", starter.data_dir)
    draw, removed = random.Random(starter.count), 0
    for number in range(max(KILLS // 20, 1)):
        workdir = tmp_path / f"run{number}"
        processes = starter.start(workdir)
        while not (workdir / "config.json").exists():
            time.sleep(0.01)
        time.sleep(0.3 * seconds * draw.random())
        workdir.rename(tmp_path / "gone")
        codes, errors = ended(processes)
        shutil.rmtree(tmp_path / "gone")
        if codes != [0] * starter.count:  # It had not written its last line.
            assert codes == [2] * starter.count, errors
            assert "Traceback" not in "".join(errors), errors
            removed += 1
        starter.finish(workdir)
        assert_same(result(workdir, starter.data_dir), reference)
    assert removed
    print(f"{removed} of {number + 1} removals of the folder of {starter.count} process(es) said")
