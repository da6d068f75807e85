"""A run's folder has one trainer, which says so where the folder vanishes or is taken."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from moe_jax.errors import UserError
from moe_jax.training import run_lock
from moe_jax.training.run_lock import LOCK_FILE, RunLock
from tests.training.bucket import empty_bucket

_HOLD = """
import sys, time
from moe_jax.training.run_lock import RunLock
RunLock.take(sys.argv[1])
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(run_lock, "SILENCE_SECONDS", 0.3)


@pytest.fixture
def other(tmp_path):
    """A process that holds the lock of `run`."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def _elsewhere(path: pathlib.Path, beats: int = 0) -> None:
    """Writes the lock of a process of another machine."""
    holder = {"pid": 7, "host": "far", "since": "then", "boot": "far 1", "token": "t"}
    path.write_text(json.dumps({**holder, "beat": beats}))


def test_a_second_trainer_is_told_who_holds_the_folder(tmp_path, other):
    with pytest.raises(UserError) as error:
        RunLock.take(tmp_path / "run")
    message = str(error.value)
    assert f"is held by process {other.pid} on {os.uname().nodename} since 20" in message
    assert "use another --workdir" in message and "\n" not in message


def test_the_lock_of_a_killed_process_is_free_at_once(tmp_path, other):
    other.send_signal(signal.SIGKILL)
    other.wait()
    begin = time.perf_counter()
    with RunLock.take(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert time.perf_counter() - begin < 1


def test_a_stopped_process_still_holds_it(tmp_path, other, quick):
    other.send_signal(signal.SIGSTOP)
    with pytest.raises(UserError, match=rf"process {other.pid} "):
        RunLock.take(tmp_path / "run")
    other.send_signal(signal.SIGCONT)


def test_two_in_one_process_are_refused_too(tmp_path):
    with RunLock.take(tmp_path), pytest.raises(UserError, match=f"process {os.getpid()} "):
        RunLock.take(tmp_path)
    RunLock.take(tmp_path).release()


def test_nothing_is_left_where_no_run_began(tmp_path):
    RunLock.take(tmp_path / "run").release()
    assert not list(tmp_path.iterdir())
    (tmp_path / "run").mkdir()
    RunLock.take(tmp_path / "run").release()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_dead_host_is_followed_after_its_silence(tmp_path, quick, caplog):
    _elsewhere(tmp_path / LOCK_FILE)
    with RunLock.take(tmp_path):
        assert "process 7 on far since then" in caplog.text and "taken for dead" in caplog.text
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("flock", [True, False], ids=["own locks", "no locks"])
def test_a_living_host_is_noticed_by_its_beats(tmp_path, quick, monkeypatch, flock):
    if not flock:
        monkeypatch.setattr(run_lock.fcntl, "flock", _unsupported)
    _elsewhere(tmp_path / LOCK_FILE)
    beat = threading.Timer(0.1, _elsewhere, (tmp_path / LOCK_FILE, 1))
    beat.start()
    with pytest.raises(UserError, match="is held by process 7 on far since then"):
        RunLock.take(tmp_path)
    beat.join()


def _unsupported(file: int, operation: int) -> None:
    raise OSError(95, os.strerror(95))


def test_where_the_kernel_has_no_say_the_file_decides(tmp_path, quick, monkeypatch):
    monkeypatch.setattr(run_lock.fcntl, "flock", _unsupported)
    with RunLock.take(tmp_path), pytest.raises(UserError, match="is held by"):
        RunLock.take(tmp_path)
    with RunLock.take(tmp_path):
        assert (tmp_path / LOCK_FILE).exists()


def test_in_a_bucket_the_object_decides(monkeypatch, quick):
    with empty_bucket(monkeypatch) as bucket:
        with RunLock.take(bucket) as lock, pytest.raises(UserError, match="is held by"):
            lock.check()
            RunLock.take(bucket)
        assert not (bucket / LOCK_FILE).exists()


def test_who_lost_the_folder_says_so_and_leaves_the_file(tmp_path, quick):
    with RunLock.take(tmp_path) as lock:
        lock.check()
        _elsewhere(tmp_path / LOCK_FILE)
        with pytest.raises(UserError, match="was taken over by process 7 on far since then"):
            lock.check()
    assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == 7


def test_a_vanished_folder_is_said_and_not_made_again(tmp_path):
    with RunLock.take(tmp_path / "run") as lock:
        (tmp_path / "run" / "config.json").write_text("{}")
        shutil.rmtree(tmp_path / "run")
        with pytest.raises(UserError, match="was removed or emptied while the run trained in it"):
            lock.check()
    assert not (tmp_path / "run").exists()


def test_a_file_that_somebody_removed_is_written_again(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with RunLock.take(tmp_path) as lock:
        (tmp_path / LOCK_FILE).unlink()
        lock.check()
        with pytest.raises(UserError, match="is held by"):
            RunLock.take(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b'{"pid": 1}'])
def test_a_damaged_file_holds_nobody_off(tmp_path, content):
    (tmp_path / LOCK_FILE).write_bytes(content)
    with RunLock.take(tmp_path) as lock:
        lock.check()
