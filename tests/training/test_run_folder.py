"""Whatever happens to a run's folder is said, and what is left of it is continued."""

import copy
import json
import os
import shutil

import pytest

from moe_jax import configuration
from moe_jax.data.pipelines import TextPipeline
from moe_jax.errors import UserError
from moe_jax.training import experiment, loop, metrics, provenance
from moe_jax.training.optimizers import Schedule
from moe_jax.training.run_lock import LOCK_FILE
from tests.training.one_block import get_config


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory):
    """A config, and the folder of its run of six steps with all checkpoints and records."""
    config = get_config()
    config.data.data_dir, config.steps, config.checkpoint.every = data_dir, 6, 2
    workdir = tmp_path_factory.mktemp("finished") / "run"
    loop.train(config, workdir)
    return config, workdir


@pytest.fixture
def run(finished, tmp_path):
    """A copy of both, which may go on for two steps."""
    config, workdir = copy.deepcopy(finished[0]), tmp_path / "run"
    shutil.copytree(finished[1], workdir)
    config.steps = 8
    return config, workdir


def at_step(monkeypatch, number, action) -> None:
    """Calls `action` once, when the data of a step are read."""
    rows, waiting = TextPipeline.rows, [action]

    def rows_and_action(self, index, first, last):
        if index + 1 == number and waiting:
            waiting.pop()()
        return rows(self, index, first, last)

    monkeypatch.setattr(TextPipeline, "rows", rows_and_action)


def steps(workdir) -> list[int]:
    return [record["step"] for record in metrics.read(workdir)]


def test_while_a_run_trains_its_folder_has_its_lock_and_afterwards_not(run, monkeypatch):
    config, workdir = run
    seen = []
    at_step(monkeypatch, 7, lambda: seen.append((workdir / LOCK_FILE).exists()))
    loop.train(config, workdir)
    assert all(seen) and seen and not (workdir / LOCK_FILE).exists()


def test_a_second_trainer_is_refused_and_the_first_loses_nothing(run, monkeypatch):
    config, workdir = run
    refused = []

    def second() -> None:
        with pytest.raises(UserError, match="is held by process") as error:
            loop.train(config, workdir)
        refused.append(error.value)

    at_step(monkeypatch, 7, second)
    loop.train(config, workdir)
    assert refused and steps(workdir) == list(range(1, 9))


# The folder's files.


def test_damaged_records_lose_themselves_only(run, caplog):
    config, workdir = run
    lines = (workdir / "metrics.jsonl").read_bytes().splitlines()
    lines[1:3] = [b"{", b"\xff"]
    (workdir / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    loop.train(config, workdir)
    assert steps(workdir) == [1, 4, 5, 6, 7, 8]
    assert "line 3, after step 1 and before step 4, is damaged" in caplog.text


def test_what_a_kill_cut_short_is_repeated_without_a_word(run, caplog):
    config, workdir = run
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "train/l')
    loop.train(config, workdir)
    assert steps(workdir) == list(range(1, 9))
    assert not (workdir / metrics.DAMAGED_FILE).exists() and "damaged" not in caplog.text


def test_a_last_record_without_its_end_is_damaged_if_it_will_not_be_repeated(run, caplog):
    config, workdir = run
    text = (workdir / "metrics.jsonl").read_text()
    (workdir / "metrics.jsonl").write_text(text[:-20])
    loop.train(config, workdir)
    assert steps(workdir) == [1, 2, 3, 4, 5, 7, 8]
    assert "line 6, after step 5, is damaged" in caplog.text


def test_records_that_are_gone_are_said(run, caplog):
    config, workdir = run
    (workdir / "metrics.jsonl").unlink()
    loop.train(config, workdir)
    assert steps(workdir) == [7, 8]
    assert "is gone, so that the run has no records up to step 6" in caplog.text


def test_a_lost_config_is_brought_back_from_a_checkpoint(run, caplog):
    config, workdir = run
    before = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").unlink()
    config.seed += 1
    with pytest.raises(UserError, match=r"holds another run: config\.seed"):
        loop.train(config, workdir)
    assert json.loads((workdir / "config.json").read_text()) == before
    assert "has lost its config.json, which is written anew from the manifest of" in caplog.text
    (workdir / "config.json").unlink()
    config.seed -= 1
    loop.train(config, workdir)
    assert steps(workdir) == list(range(1, 9))


@pytest.mark.parametrize(
    "field", ["optimizer.learning_rate", "model.moe.router.losses.load_balancing"]
)
def test_a_run_does_not_go_on_with_other_numbers(run, field):
    """Though its compiled step takes them."""
    config, workdir = run
    config = configuration.changed(config, {field: 0.123})
    with pytest.raises(
        UserError, match=rf"holds another run: config\.{field} \(the run has .* 0.123\)"
    ):
        loop.train(config, workdir)


def test_without_its_checkpoints_a_run_does_not_begin_anew(run):
    config, workdir = run
    shutil.rmtree(workdir / "checkpoints")
    with pytest.raises(
        UserError, match="has records up to step 6, but no checkpoint, though every 2"
    ):
        loop.train(config, workdir)
    assert steps(workdir) == list(range(1, 7))


def test_a_renamed_checkpoint_of_version_0_1_is_noticed(run):
    config, workdir = run
    path = workdir / "checkpoints" / "6" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text())["files"]))
    path.parent.rename(workdir / "checkpoints" / "7")
    with pytest.raises(UserError, match="checkpoint step 7 holds the state after step 6; give its"):
        loop.train(config, workdir)


# While it trains.


def test_a_folder_that_vanishes_is_said_at_the_next_write(run, monkeypatch, tmp_path):
    config, workdir = run
    at_step(monkeypatch, 7, lambda: workdir.rename(tmp_path / "moved"))
    with pytest.raises(UserError) as error:
        loop.train(config, workdir)
    assert f"workdir {workdir} was removed or emptied while the run trained" in str(error.value)
    assert not workdir.exists()
    monkeypatch.undo()
    (tmp_path / "moved").rename(workdir)
    loop.train(config, workdir)
    assert steps(workdir) == list(range(1, 9))


def test_after_a_folder_vanished_the_same_command_starts_anew(run, monkeypatch):
    config, workdir = run
    at_step(monkeypatch, 7, lambda: shutil.rmtree(workdir))
    with pytest.raises(UserError, match="start anew"):
        loop.train(config, workdir)
    monkeypatch.undo()
    config.steps = 2
    loop.train(config, workdir)
    assert steps(workdir) == [1, 2]


@pytest.mark.parametrize("left", ["checkpoints", "config.json"])
def test_of_a_folder_that_lost_a_part_the_rest_is_continued(run, monkeypatch, left):
    config, workdir = run

    def remove() -> None:
        for path in workdir.iterdir():
            if path.name != left:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    at_step(monkeypatch, 7, remove)
    with pytest.raises(UserError):
        loop.train(config, workdir)
    monkeypatch.undo()
    config.steps = 7
    loop.train(config, workdir)
    assert steps(workdir) == ([7] if left == "checkpoints" else list(range(1, 8)))


def test_records_that_vanish_are_said_at_the_next_one(run, monkeypatch):
    config, workdir = run
    at_step(monkeypatch, 7, (workdir / "metrics.jsonl").unlink)
    with pytest.raises(UserError) as error:
        loop.train(config, workdir)
    assert "record of step 7 could not be written to" in str(error.value)
    assert "No such file or directory" in str(error.value)
    assert "to continue from step 6" in str(error.value)


def test_a_folder_that_cannot_be_written_is_said(run, monkeypatch):
    config, workdir = run

    def fail(file: int) -> None:
        raise OSError(28, os.strerror(28))

    at_step(monkeypatch, 7, lambda: monkeypatch.setattr(os, "fsync", fail))
    with pytest.raises(
        UserError, match=r"could not be written to .*: No space left on device; make"
    ):
        loop.train(config, workdir)
    monkeypatch.undo()
    loop.train(config, workdir)
    assert steps(workdir) == list(range(1, 9))


# What changes the numbers.


@pytest.mark.parametrize(
    ("setting", "value"), [("jax_enable_x64", "True"), ("jax_default_prng_impl", "rbg")]
)
def test_other_settings_of_jax_are_refused(run, setting, value):
    config, workdir = run
    record = json.loads((workdir / "config.json").read_text())
    assert record["numerics"] == provenance.numerics()
    record["numerics"][setting] = value
    (workdir / "config.json").write_text(json.dumps(record))
    with pytest.raises(
        UserError, match=rf"other settings of JAX.*: {setting} is .* and was '{value}'"
    ):
        loop.train(config, workdir)


def test_other_flags_of_xla_are_said(run, caplog, monkeypatch):
    config, workdir = run
    flags = os.environ.get("XLA_FLAGS", "")
    more = "--xla_cpu_enable_fast_math=true --xla_dump_to=x"
    monkeypatch.setenv("XLA_FLAGS", f"{flags} {more}")
    loop.train(config, workdir)
    assert "may change the last bits: --xla_cpu_enable_fast_math=true is new." in caplog.text


def test_a_learning_rate_that_jumps_is_said(tmp_path, caplog):
    config = get_config()
    config.optimizer.schedule, config.optimizer.warmup_steps, config.steps = Schedule.COSINE, 2, 10
    record = {"config": configuration.encode(config), "imports": {}}
    (tmp_path / "config.json").write_text(json.dumps(record))
    experiment.say_change_of_rate(tmp_path, config, 10)
    assert not caplog.text
    config.steps = 20
    experiment.say_change_of_rate(tmp_path, config, 10)
    # The peak is 0.01, and 8 of 18 steps of the cosine to 0.001 are done.
    assert (
        "steps goes from 10 to 20, and with it schedule=cosine: step 11 has the learning rate"
        in (caplog.text)
    )
    assert "0.006281, where the run would have gone on with 0.001." in caplog.text
    caplog.clear()
    config.optimizer.schedule = Schedule.INVERSE_SQRT
    record["config"] = configuration.encode(config)
    (tmp_path / "config.json").write_text(json.dumps(record))
    config.steps = 30
    experiment.say_change_of_rate(tmp_path, config, 10)
    assert not caplog.text
