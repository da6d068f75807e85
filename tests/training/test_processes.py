"""Several processes are one run: equal numbers, one death ends all, all stop at the same step."""

import dataclasses
import os
import pathlib
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from moe_jax.parallel.ending import LOST_STATUS
from moe_jax.parallel.stderr_relay import LOST
from moe_jax.training import experiment, loop, metrics
from moe_jax.training.checkpoints import Checkpoints
from moe_jax.training.run import Run
from tests.training.one_block import get_config

ROOT = pathlib.Path(__file__).parents[2]


@dataclasses.dataclass
class Ended:
    """Return codes and stderr of the processes of a run, and the checkpoints they left."""

    codes: list[int]
    errors: list[str]
    steps: list[int]

    def __str__(self):
        pairs = zip(self.codes, self.errors, strict=True)
        return "\n".join(f"{code}: {errors[-2000:]}" for code, errors in pairs)


def run_processes(data_dir, workdir, count, signal_name="SIGTERM", at_step=0) -> Ended:
    """Runs `count` processes to their ends; the last one sends itself a signal at a step."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"
    }  # fmt: skip
    script = "tests/training/one_of_several.py"
    flags = [
        "--config=tests/training/one_block.py",
        f"--config.data.data_dir={data_dir}",
        f"--workdir={workdir}",
        f"--coordinator={address}",
        f"--process_count={count}",
    ]
    processes = []
    try:
        for index in range(count):
            when = at_step if index == count - 1 else 0
            command = [sys.executable, script, signal_name, str(when), *flags]
            processes.append(
                subprocess.Popen(
                    [*command, f"--process_id={index}"],
                    cwd=ROOT,
                    env=environment,
                    stdout=subprocess.DEVNULL,  # Gloo writes a line for each connection.
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        errors = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    steps = Checkpoints(workdir / "checkpoints").steps()
    return Ended([process.returncode for process in processes], errors, steps)


@pytest.fixture(scope="module")
def config(data_dir):
    config = get_config()
    config.data.data_dir = data_dir
    return config


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    """The run of one process with eight devices."""
    workdir = tmp_path_factory.mktemp("alone")
    loop.train(config, workdir)
    return workdir


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tmp_path_factory.mktemp("together")


@pytest.fixture(scope="module")
def killed(data_dir, workdir):
    """Two processes, of which the second dies in step 5."""
    return run_processes(data_dir, workdir, 2, "SIGKILL", 5)


@pytest.fixture(scope="module")
def stopped(data_dir, workdir, killed):
    """Both again; the second is asked to stop in step 6."""
    return run_processes(data_dir, workdir, 2, "SIGTERM", 6)


@pytest.fixture(scope="module")
def finished(data_dir, workdir, stopped):
    """Four processes with two devices each do the rest."""
    return run_processes(data_dir, workdir, 4)


def state(config, workdir, step):
    run = Run.build(config)
    with jax.set_mesh(run.mesh):
        return jax.device_get(run.restore(Checkpoints(workdir / "checkpoints"), step))


def assert_same_state(config, workdir, alone, step):
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7),
        state(config, workdir, step),
        state(config, alone, step),
    )


def test_one_death_ends_both(killed):
    assert killed.codes[1] == -signal.SIGKILL, killed
    assert killed.codes[0] in (-signal.SIGABRT, LOST_STATUS), killed
    assert killed.errors[0].endswith(f"\n{LOST}\n") and "Traceback" not in killed.errors[0]
    assert killed.steps == [3]


def test_two_processes_equal_one(config, workdir, alone, killed):
    assert_same_state(config, workdir, alone, 3)


def test_both_resume_and_a_signal_to_one_stops_both_at_the_same_step(
    config, workdir, alone, stopped
):
    assert stopped.codes == [143, 143], stopped
    assert "Continuing from step 3 on 8 x cpu (cpu) of 2 processes" in stopped.errors[0]
    for errors in stopped.errors:
        assert "stopped at step 7 of 9 and saved" in errors
    assert stopped.steps == [3, 6, 7]
    assert_same_state(config, workdir, alone, 6)


def test_four_processes_continue_and_the_run_is_that_of_one_process(
    config, workdir, alone, finished
):
    assert finished.codes == [0] * 4, finished
    assert "Continuing from step 7 on 8 x cpu (cpu) of 4 processes" in finished.errors[0]
    assert_same_state(config, workdir, alone, 9)
    records, expected = metrics.read(workdir), metrics.read(alone)
    assert [r["step"] for r in records] == list(range(1, 10))
    for record, other in zip(records, expected, strict=True):
        names = {name for name in other if not name.startswith("time/")}
        assert names == {name for name in record if not name.startswith("time/")}
        for name in names:
            np.testing.assert_allclose(record[name], other[name], 1e-5, 1e-7, err_msg=name)
    assert "eval/loss" in records[-1]


def test_the_first_process_alone_writes_and_informs(workdir, finished):
    record = experiment.read_record(workdir)
    assert (record["process_count"], record["device_count"]) == (4, 8)
    assert (workdir / "report.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(workdir.glob("events.out.tfevents.*"))) == 3  # One for each start.
    assert "step/s" in finished.errors[0]
    for errors in finished.errors[1:]:
        assert "step/s" not in errors and "Continuing" not in errors
