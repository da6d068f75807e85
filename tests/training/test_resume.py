"""A run that was killed anywhere ends as the run that was not."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from moe_jax.training import loop, metrics
from moe_jax.training.checkpoints import Checkpoints, CheckpointStage
from moe_jax.training.run import Run
from tests.tiny import tiny_config

ROOT = pathlib.Path(__file__).parents[2]


def start(data_dir, workdir, *where, optimized=False) -> subprocess.Popen:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": str(int(not optimized)),
    }
    command = [sys.executable, "tests/training/run_and_die.py", data_dir, str(workdir), *where]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def run(data_dir, workdir, *where, optimized=False) -> int:
    process = start(data_dir, workdir, *where, optimized=optimized)
    _, errors = process.communicate(timeout=300)
    assert process.returncode in (0, -signal.SIGKILL), errors
    return process.returncode


@pytest.fixture(scope="module")
def uninterrupted(data_dir, tmp_path_factory) -> pathlib.Path:
    """In this process: the others, which are killed, load the programs that it compiles."""
    workdir = tmp_path_factory.mktemp("uninterrupted")
    loop.train(tiny_config(data_dir), workdir)
    return workdir


def state(workdir, data_dir):
    checkpoints = Checkpoints(workdir / "checkpoints")
    with jax.set_mesh((built := Run.build(tiny_config(data_dir))).mesh):
        return jax.device_get(built.restore(checkpoints, 8))


def timeless(workdir) -> list[dict]:
    return [
        {name: value for name, value in record.items() if not name.startswith("time/")}
        for record in metrics.read(workdir)
    ]


def assert_same_run(workdir, reference, data_dir) -> None:
    jax.tree.map(
        np.testing.assert_array_equal, state(workdir, data_dir), state(reference, data_dir)
    )
    assert timeless(workdir) == timeless(reference)
    assert [r["step"] for r in metrics.read(workdir)] == [2, 4, 6, 8]


def test_killed_before_during_and_after_each_commit(uninterrupted, data_dir, tmp_path):
    """Each process dies one stage further than the one before; the last run finishes."""
    for stage, step, good in [
        (CheckpointStage.WRITING, 4, None),
        (CheckpointStage.WRITTEN, 8, 4),
        (CheckpointStage.COMMITTED, 8, 4),
        (CheckpointStage.DONE, 8, 8),
    ]:
        assert run(data_dir, tmp_path, stage.value, str(step)) == -signal.SIGKILL
        assert Checkpoints(tmp_path / "checkpoints").newest_good() == good
    loop.train(tiny_config(data_dir), tmp_path)
    assert_same_run(tmp_path, uninterrupted, data_dir)


def test_sigterm_saves_and_exits_cleanly(uninterrupted, data_dir, tmp_path):
    process = start(data_dir, tmp_path)
    while not metrics.read(tmp_path):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    # Unless it had finished when the signal came.
    stopped = "run the same command again to continue" in errors
    assert process.returncode == (143 if stopped else 0), errors
    assert stopped or metrics.read(tmp_path)[-1]["step"] == 8
    assert Checkpoints(tmp_path / "checkpoints").newest_good() >= 2
    loop.train(tiny_config(data_dir), tmp_path)
    assert_same_run(tmp_path, uninterrupted, data_dir)


@pytest.mark.slow
def test_killed_at_random_moments_as_users_compile(data_dir, tmp_path_factory):
    reference, killed = tmp_path_factory.mktemp("reference"), tmp_path_factory.mktemp("killed")
    assert run(data_dir, reference, optimized=True) == 0
    begin = time.perf_counter()  # Of a run whose programs are compiled, as they are from here on.
    assert run(data_dir, tmp_path_factory.mktemp("timed"), optimized=True) == 0
    seconds = time.perf_counter() - begin
    draw = random.Random(0)
    kills = 0
    for _ in range(5):
        process = start(data_dir, killed, optimized=True)
        try:
            process.communicate(timeout=seconds * draw.uniform(0.3, 0.9))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
    assert kills
    assert run(data_dir, killed, optimized=True) == 0
    assert_same_run(killed, reference, data_dir)


def test_a_finished_run_stays_as_it_is(uninterrupted, data_dir):
    before = (uninterrupted / "metrics.jsonl").read_text()
    loop.train(tiny_config(data_dir), uninterrupted)
    assert (uninterrupted / "metrics.jsonl").read_text() == before


def test_record_cut_short_by_a_kill_is_repaired(uninterrupted, data_dir, tmp_path):
    lines = (uninterrupted / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:3]) + lines[3][:17])
    writer = metrics.MetricsWriter(tmp_path, step=4)
    writer.write({"step": 6, "train/loss": 1.0})
    writer.close()
    steps = [json.loads(x)["step"] for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 6]
