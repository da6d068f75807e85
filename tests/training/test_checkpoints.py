"""Whatever happens to a checkpoint's files, the newest good one is found and restored bit for bit."""

import errno
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import types
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from etils import epath
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moe_jax.errors import UserError
from moe_jax.training.checkpoints import Checkpoints, CheckpointStage

_AXES = ("data", "expert", "model")


def _place(state, *mesh_shape: int):
    """Shards the state's arrays over a mesh: 2-dimensional ones in both dimensions."""
    mesh = jax.make_mesh(mesh_shape, _AXES, axis_types=(AxisType.Auto,) * 3)
    specs = {2: PartitionSpec("expert", ("data", "model")), 1: PartitionSpec("data")}
    return jax.tree.map(
        lambda x: jax.device_put(x, NamedSharding(mesh, specs.get(x.ndim, PartitionSpec()))), state
    )


def _state(seed: int = 0, *mesh_shape: int):
    rng = np.random.default_rng(seed)
    kernel = rng.standard_normal((8, 16)).astype(np.float32)
    state = {
        "params": {"layers": [{"kernel": kernel, "bias": kernel[0].astype(jnp.bfloat16)}]},
        "key": rng.integers(0, 2**32, 4, dtype=np.uint32),
        "step": np.int32(seed),
    }
    return _place(jax.tree.map(jnp.asarray, state), *(mesh_shape or (2, 2, 2)))


def _abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def _assert_same_bits(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def _payload(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json")


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    logged: list[str] = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: logged.append(text % args))
    return logged


@pytest.fixture
def two_saved(tmp_path) -> Checkpoints:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(20, _state(20))
    checkpoints.save(40, _state(40))
    return checkpoints


# Round trips.


def test_no_directory_means_no_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path / "none")
    assert checkpoints.steps() == []
    assert checkpoints.newest_good() is None


@pytest.mark.parametrize(
    "mesh_shape", [(1, 1, 1), (2, 1, 1), (1, 2, 2), (1, 8, 1), (4, 1, 2)], ids=str
)
def test_restores_bits_onto_another_mesh(tmp_path, mesh_shape):
    state = _state(7, 2, 2, 2)
    Checkpoints(tmp_path).save(7, state)
    target = _abstract(_place(state, *mesh_shape))
    restored = Checkpoints(tmp_path).restore(7, target)
    _assert_same_bits(restored, state)
    for leaf, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(target), strict=True):
        assert leaf.sharding == wanted.sharding


def test_special_bit_patterns_survive(tmp_path):
    bits = jnp.array([0x7FC00001, 0xFF800000, 0x80000000, 0x00000001], jnp.uint32)
    state = {"odd": jax.lax.bitcast_convert_type(bits, jnp.float32)}  # nan, -inf, -0., subnormal
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(0, state)
    _assert_same_bits(checkpoints.restore(0, _abstract(state)), state)


def test_relative_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Checkpoints("run/checkpoints").save(3, _state(3))
    assert Checkpoints(tmp_path / "run" / "checkpoints").newest_good() == 3


def test_manifest_lists_every_file(two_saved, tmp_path):
    manifest = json.loads((tmp_path / "40" / "manifest.json").read_text())
    assert manifest["step"] == 40
    manifest = manifest["files"]
    files = {str(p.relative_to(tmp_path / "40")): p for p in _payload(tmp_path / "40")}
    assert manifest.keys() == files.keys()
    assert all(manifest[name]["size"] == path.stat().st_size for name, path in files.items())


def test_saving_a_good_step_again_changes_nothing(two_saved, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    two_saved.save(40, _state(40))
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_saving_a_damaged_step_again_replaces_it(two_saved, tmp_path):
    _flip(_payload(tmp_path / "40")[0])
    two_saved.save(40, _state(41))
    assert two_saved.newest_good() == 40
    _assert_same_bits(two_saved.restore(40, _abstract(_state())), _state(41))


def test_keeps_the_newest(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (5, 10, 15):
        checkpoints.save(step, _state(step))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["10", "15"]


def test_damaged_future_pushes_no_good_one_out(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(30, _state(30))
    _flip(_payload(tmp_path / "30")[0])
    checkpoints.save(20, _state(20))
    assert checkpoints.newest_good() == 20


def test_keep_must_be_positive(tmp_path):
    with pytest.raises(UserError, match="keep is 0, but at least 1"):
        Checkpoints(tmp_path, keep=0)


# Damage.


def _flip(path: pathlib.Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def _truncate(path: pathlib.Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize(
    ("damage", "word"),
    [(_flip, "flipped bits"), (_truncate, "truncated"), (pathlib.Path.unlink, "missing")],
)
def test_damage_to_any_file_is_found_and_named(
    two_saved, tmp_path, warnings, damage: Callable[[pathlib.Path], None], word: str
):
    for path in _payload(tmp_path / "40"):
        content = path.read_bytes()
        damage(path)
        assert two_saved.newest_good() == 20
        (warning,) = warnings
        assert warning.startswith(f"Checkpoint step 40 in {tmp_path} is not used: file ")
        assert f"file {path.relative_to(tmp_path / '40')} " in warning
        assert word in warning and warning.endswith("used instead: step 20.")
        path.write_bytes(content)
        warnings.clear()
    assert two_saved.newest_good() == 40 and not warnings


def test_extra_file_is_damage(two_saved, tmp_path, warnings):
    (tmp_path / "40" / "d" / "stray").write_text("x")
    assert two_saved.newest_good() == 20
    assert "file d/stray does not belong to it" in warnings[0]


@pytest.mark.parametrize(
    ("marked", "why"),
    [
        (True, "its save was interrupted and left no manifest.json"),
        (False, "its manifest.json is gone"),
    ],
)
def test_without_a_manifest_a_checkpoint_is_not_used(two_saved, tmp_path, warnings, marked, why):
    (tmp_path / "40" / "manifest.json").unlink()
    if marked:
        (tmp_path / "40" / "unfinished.json").touch()
    assert two_saved.steps() == [20]
    assert two_saved.newest_good() == 20
    assert warnings == [
        f"Checkpoint step 40 in {tmp_path} is not used: {why}; used instead: step 20."
    ]


def test_without_any_manifest_the_run_does_not_begin_anew(two_saved, tmp_path):
    for step in (20, 40):
        (tmp_path / str(step) / "manifest.json").unlink()
    with pytest.raises(UserError) as error:
        two_saved.newest_good()
    assert "lost their manifest.json (step 20, 40)" in str(error.value)


def test_a_checkpoint_without_manifest_is_put_aside_and_not_removed(two_saved, tmp_path):
    (tmp_path / "40" / "manifest.json").unlink()
    before = {p.relative_to(tmp_path / "40"): p.read_bytes() for p in _payload(tmp_path / "40")}
    two_saved.save(40, _state(41))
    _assert_same_bits(two_saved.restore(40, _abstract(_state())), _state(41))
    kept = tmp_path / "kept1-40"
    assert {p.relative_to(kept): p.read_bytes() for p in _payload(kept)} == before


def test_a_renamed_checkpoint_is_noticed(two_saved, tmp_path, warnings):
    (tmp_path / "40").rename(tmp_path / "60")
    assert two_saved.newest_good() == 20
    assert "step 60" in warnings[0] and "saved as step 40 and renamed" in warnings[0]
    with pytest.raises(UserError, match=r"step 60 .* is damaged.*saved as step 40"):
        two_saved.restore(60, _abstract(_state()))


def test_a_manifest_of_version_0_1_is_read(two_saved, tmp_path):
    path = tmp_path / "40" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text())["files"]))
    assert two_saved.newest_good() == 40
    assert two_saved.about(40) == {}


def test_a_manifest_says_of_which_run_it_is(tmp_path):
    Checkpoints(tmp_path, about={"config": {"steps": 3}}).save(1, _state())
    assert Checkpoints(tmp_path).about(1) == {"config": {"steps": 3}}


# Other people's files.


def _contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def _save_and_retire_all(tmp_path) -> Checkpoints:
    """Makes every step from 56 to 59, keeping one."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step in range(56, 60):
        checkpoints.save(step, _state(step))
    return checkpoints


@pytest.mark.parametrize("name", ["2024", "57", "057", "\u0665\u0667", "58.orbax-checkpoint-tmp"])
def test_a_folder_of_notes_is_not_removed_whatever_its_name(tmp_path, name):
    for place in (name, f"{name}/d", f"{name}/ocdbt.process_0/d"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "notes.txt").write_text("mine")
    checkpoints = _save_and_retire_all(tmp_path)
    assert checkpoints.steps() == [59]
    notes = [path for path in tmp_path.rglob("notes.txt") if path.read_text() == "mine"]
    assert len(notes) == 3


@pytest.mark.parametrize("step", [20, 57])
def test_nothing_is_removed_through_a_link(tmp_path, step):
    archive = tmp_path / "archive"
    Checkpoints(archive).save(step, _state(step))
    before = _contents(archive)
    run = tmp_path / "run"
    run.mkdir()
    (run / str(step)).symlink_to(archive / str(step))
    if step == 57:
        _flip(_payload(archive / "57")[0])  # A good one would be left as it is.
        before = _contents(archive)
    _save_and_retire_all(run)
    assert _contents(archive) == before


def test_links_inside_a_checkpoint_are_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "manifest.ocdbt").write_text("not the run's")
    run = tmp_path / "run"
    checkpoints = Checkpoints(run, keep=1)
    checkpoints.save(1, _state(1))
    (run / "1" / "ocdbt.process_7").symlink_to(outside)
    checkpoints.save(2, _state(2))
    assert (outside / "manifest.ocdbt").read_text() == "not the run's"
    assert os.listdir(run / "1") == ["ocdbt.process_7"] and checkpoints.steps() == [2]


def test_what_is_in_the_way_is_put_aside(tmp_path):
    (tmp_path / "56").write_text("a file")
    (tmp_path / "57").symlink_to(tmp_path / "nowhere")
    (tmp_path / "58").mkdir()
    (tmp_path / "kept1-58").mkdir()
    assert _save_and_retire_all(tmp_path).steps() == [59]
    assert (tmp_path / "kept1-56").read_text() == "a file"
    assert (tmp_path / "kept1-57").is_symlink() and (tmp_path / "kept2-58").is_dir()


def test_what_somebody_put_into_a_checkpoint_outlives_it(two_saved, tmp_path, warnings):
    (tmp_path / "20" / "notes.txt").write_text("mine")
    for step in (60, 80):
        two_saved.save(step, _state(step))
    assert os.listdir(tmp_path / "20") == ["notes.txt"]
    assert warnings == [
        f"Checkpoint folder {tmp_path / '20'} keeps notes.txt, which the run did not write."
    ]


@pytest.mark.parametrize(
    "manifest", ["", "{", "[1]", '{"a": 1}', '{"_METADATA": {"size": 1}}', "{}", "\x00"]
)
def test_corrupted_manifest_is_damage(two_saved, tmp_path, warnings, manifest):
    (tmp_path / "40" / "manifest.json").write_text(manifest)
    assert two_saved.newest_good() == 20
    assert len(warnings) == 1


def test_flipped_digest_in_manifest_is_damage(two_saved, tmp_path):
    path = tmp_path / "40" / "manifest.json"
    text = path.read_text()
    at = text.index('"sha256": "') + len('"sha256": "')
    path.write_text(text[:at] + ("0" if text[at] != "0" else "1") + text[at + 1 :])
    assert two_saved.newest_good() == 20


def test_only_damaged_ones_is_an_error(two_saved, tmp_path):
    _flip(_payload(tmp_path / "20")[0])
    _truncate(_payload(tmp_path / "40")[0])
    with pytest.raises(UserError) as error:
        two_saved.newest_good()
    message = str(error.value)
    assert message.startswith(f"directory {tmp_path} holds no undamaged checkpoint (step 40: file")
    assert "truncated" in message and "step 20: file" in message and "\n" not in message


def test_restoring_a_damaged_or_absent_step_is_refused(two_saved, tmp_path):
    _flip(_payload(tmp_path / "40")[0])
    with pytest.raises(UserError, match=r"step 40 in .* is damaged.*flipped bits"):
        two_saved.restore(40, _abstract(_state()))
    with pytest.raises(UserError, match=r"step 30 in .* does not exist; .* are \[20, 40\]"):
        two_saved.restore(30, _abstract(_state()))


# Other states.


def _without_key(state):
    del state["key"]


def _with_router(state):
    state["params"]["router"] = jnp.zeros(3)


def _with_wider_bias(state):
    state["params"]["layers"][0]["bias"] = jnp.zeros(32, jnp.bfloat16)


def _with_float32_bias(state):
    state["params"]["layers"][0]["bias"] = jnp.zeros(16, jnp.float32)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_without_key, "leaf key is in checkpoint step 40 in "),
        (_with_router, "leaf params/router is in this run's state but not in checkpoint step 40"),
        (_with_wider_bias, "leaf params/layers/0/bias is bfloat16[16] in checkpoint step 40 in "),
        (_with_float32_bias, "but float32[16] in this run's state; use the configuration of "),
    ],
)
def test_another_state_is_refused_by_leaf(two_saved, change, words):
    state = _state()
    change(state)
    with pytest.raises(UserError) as error:
        two_saved.restore(40, _abstract(state))
    assert words in str(error.value) and "\n" not in str(error.value)


# Interruptions and failures, in real processes.

_CHILD = """
    import os, resource, signal, sys
    import jax, jax.numpy as jnp
    jax.config.update("jax_platforms", "cpu")
    from moe_jax.errors import UserError
    from moe_jax.training.checkpoints import Checkpoints, CheckpointStage
    directory = sys.argv[1]
"""


def _run_child(body: str, *args: object) -> subprocess.CompletedProcess[str]:
    program = textwrap.dedent(_CHILD) + textwrap.dedent(body)
    command = [sys.executable, "-c", program, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("stage", list(CheckpointStage))
def test_sigkill_at_any_stage(tmp_path, stage):
    Checkpoints(tmp_path).save(20, _state(20))
    child = _run_child(
        """
        def kill(stage, step):
            if stage == sys.argv[2]:
                os.kill(os.getpid(), signal.SIGKILL)
        Checkpoints(directory, on_stage=kill).save(40, {"x": jnp.ones((4, 4))})
        """,
        *(tmp_path, stage),
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert len(list(tmp_path.iterdir())) == 2  # The interrupted save left its folder.

    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.newest_good() == (40 if stage is CheckpointStage.DONE else 20)
    checkpoints.save(60, _state(60))
    assert checkpoints.newest_good() == 60
    assert checkpoints.steps() == ([20, 40, 60] if stage is CheckpointStage.DONE else [20, 60])
    assert {p.name for p in tmp_path.iterdir()} == set(map(str, checkpoints.steps()))


@pytest.mark.parametrize("stage", [CheckpointStage.WRITING, CheckpointStage.COMMITTED])
def test_unfinished_alone_counts_as_none(tmp_path, warnings, stage):
    def interrupt(reached: CheckpointStage, step: int) -> None:
        if reached is stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Checkpoints(tmp_path, on_stage=interrupt).save(20, _state())
    assert Checkpoints(tmp_path).newest_good() is None
    assert warnings[0].startswith(f"Checkpoint step 20 in {tmp_path} is not used: its save was ")
    assert warnings[0].endswith("used instead: none.")


def test_operating_system_refuses_to_write(tmp_path):
    child = _run_child(
        """
        state = {f"w{i}": jax.random.normal(jax.random.key(i), (64, 64)) for i in range(4)}
        checkpoints = Checkpoints(directory)
        checkpoints.save(20, state)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, resource.RLIM_INFINITY))
        try:
            checkpoints.save(40, state)
        except UserError as error:
            print(error)
        print(sorted(os.listdir(directory)), checkpoints.newest_good())
        """,
        tmp_path,
    )
    assert child.stdout == (
        f"checkpoint step 40 could not be written to {tmp_path}: File too large; make room or"
        " allow writing there and start again (last good checkpoint: step 20).\n"
        "['20'] 20\n"
    )


def test_full_disk_at_the_manifest(two_saved, tmp_path, monkeypatch):
    def fail(path: epath.Path, text: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as patch, pytest.raises(UserError) as error:
        patch.setattr(type(epath.Path(tmp_path)), "write_text", fail)
        two_saved.save(60, _state(60))
    assert f"step 60 could not be written to {tmp_path}: No space left" in str(error.value)
    assert str(error.value).endswith("(last good checkpoint: step 40).")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["20", "40"]
    two_saved.save(60, _state(60))
    assert two_saved.newest_good() == 60


def test_too_little_space_is_refused_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=0))
    reached: list[CheckpointStage] = []
    checkpoints = Checkpoints(tmp_path, on_stage=lambda stage, step: reached.append(stage))
    with pytest.raises(UserError, match=r"0\.0 MB are free .* \(last good checkpoint: none\)"):
        checkpoints.save(20, _state())
    assert not reached and not list(tmp_path.iterdir())


def test_directory_below_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"step 20 could not be written to .*: Not a directory"):
        Checkpoints(tmp_path / "file" / "checkpoints").save(20, _state())


def test_two_processes_write_one_checkpoint(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    program = textwrap.dedent(_CHILD) + textwrap.dedent(
        """
        jax.config.update("jax_num_cpu_devices", 2)
        jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]))
        mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        sharding = jax.NamedSharding(mesh, jax.P("data"))
        state = {"x": jax.jit(lambda: jnp.arange(8.0), out_shardings=sharding)()}
        checkpoints = Checkpoints(directory, keep=1)
        for step in (1, 1, 2):
            checkpoints.save(step, state)
        assert (checkpoints.newest_good(), checkpoints.steps()) == (2, [2])
        target = {"x": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=sharding)}
        restored = checkpoints.restore(2, target)["x"]
        assert (restored == state["x"]).all()
        """
    )
    command = [sys.executable, "-c", program, str(tmp_path), address]
    children = [
        subprocess.Popen([*command, str(index)], stderr=subprocess.PIPE, text=True)
        for index in range(2)
    ]
    for child in children:
        _, stderr = child.communicate(timeout=120)
        assert child.returncode == 0, stderr
    target = {"x": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=jnp.zeros(1).sharding)}
    assert Checkpoints(tmp_path).restore(2, target)["x"].tolist() == list(range(8))
