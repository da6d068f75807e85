"""Whole runs of the tiny config, in this process."""

import copy
import dataclasses
import json
import logging
import shutil

import jax
import numpy as np
import optax
import pytest

from moe_jax.errors import UserError
from moe_jax.parallel.mesh import MeshConfig
from moe_jax.routing.deepseek import DeepSeekV3
from moe_jax.training import experiment, loop
from moe_jax.training.checkpoints import Checkpoints
from moe_jax.training.evaluator import Evaluator
from moe_jax.training.optimizers import Schedule
from moe_jax.training.run import Run
from moe_jax.training.step import noise_key
from moe_jax.training.trained import Trained
from tests.tiny import tiny_config


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory):
    """A run long enough to learn more than byte frequencies."""
    config = tiny_config(data_dir)
    config.steps, config.optimizer.warmup_steps = 120, 10
    config.optimizer.schedule = Schedule.COSINE
    config.model.width, config.model.mlp_width, config.model.head_width = 32, 64, 16
    config.model.dropout, config.model.moe.expert_dropout = 0.0, 0.0
    config.logging.every, config.checkpoint.every, config.evaluation.every = 10, 60, 60
    workdir = tmp_path_factory.mktemp("finished")
    return workdir, loop.train(config, workdir)


def test_loss_falls_below_the_unigram_entropy(finished):
    workdir, records = finished
    entropy = experiment.read_record(workdir)["dataset"]["trivial_loss"]
    assert 2.5 < entropy < 4
    assert records[-1]["eval/loss"] < entropy
    assert records[-1]["train/loss"] < entropy


def test_load_stays_balanced(finished):
    _, records = finished
    worst = max(r["router/1/max_over_mean_load"] for r in records if r["step"] >= 60)
    assert 1 <= worst < 4


def test_every_expert_and_router_weight_has_a_gradient(finished):
    """Adam's second moments are sums of squared gradients over all steps."""
    run = Trained.load(finished[0]).run
    with jax.set_mesh(run.mesh):
        state = run.restore(Checkpoints(finished[0] / "checkpoints"), 120)
    moments = optax.tree_utils.tree_get(jax.device_get(state.optimizer), "nu")
    layer = moments["stack"]["stages"][0]["blocks"][1]["mlp"]
    for name in ("w_in", "w_out"):
        assert layer[name].shape[:2] == (1, 4)
        assert (layer[name].max(axis=(-2, -1)) > 0).all(), name
    assert (layer["router"]["weights"] > 0).all()


def test_a_run_leaves_what_the_readme_names(finished):
    workdir, records = finished
    record = json.loads((workdir / "config.json").read_text())
    assert {"config", "dataset", "versions", "commit", "device_kind", "device_count"} <= set(record)
    assert len(record["dataset"]["sha256"]) == 64
    assert record["versions"]["jax"] == jax.__version__
    rebuilt = experiment.load(workdir)
    assert rebuilt.steps == 120 and rebuilt.model.moe.router.exploration_rate == 0.01
    assert rebuilt.mesh == MeshConfig(data=2, expert=4, fsdp_min_size=64)
    assert [r["step"] for r in records] == list(range(10, 121, 10))
    names = set(records[-1])
    assert {"train/loss", "train/learning_rate", "time/tokens_per_second", "eval/loss"} <= names
    assert {"router/1/load", "router/1/dropped", "router/1/entropy", "router/1/load_cv"} <= names
    assert {"time/call_returns_ms", "eval/loss/asyncio", "router/1/logsumexp_squared"} <= names
    assert sum(records[-1]["router/1/load"]) == pytest.approx(1)
    assert list(workdir.glob("events.out.tfevents.*"))
    assert Checkpoints(workdir / "checkpoints").steps() == [60, 120]


@pytest.mark.parametrize("mesh", ["", "data:1", "data:4", "expert:2,model:2"])
def test_a_checkpoint_evaluates_equally_on_every_mesh(finished, mesh):
    workdir, records = finished
    trained = Trained.load(workdir, mesh)
    config = trained.run.config
    evaluate = Evaluator(trained.run, trained.open_data(), "validation", config.evaluation.batches)
    with jax.set_mesh(trained.run.mesh):
        losses = evaluate(trained.parameters, trained.variables)
    assert trained.step == 120
    for name, loss in losses.items():
        assert loss == pytest.approx(records[-1][name], rel=1e-6), name


@pytest.fixture(scope="module")
def alone(data_dir, tmp_path_factory):
    """Twenty steps on one device; jitter and both dropouts are on."""
    config = tiny_config(data_dir)
    config.mesh, config.steps, config.evaluation.every = MeshConfig(), 20, 5
    config.logging.every, config.checkpoint.every = 1, 20
    workdir = tmp_path_factory.mktemp("alone")
    return config, workdir, loop.train(config, workdir)


def test_losses_do_not_depend_on_the_mesh_nor_on_a_change_of_it(alone, tmp_path):
    """From eight devices to one, with more steps and other logging and checkpoints."""
    config, _, records = copy.deepcopy(alone)
    config.mesh, config.steps = MeshConfig(data=2, expert=2, model=2, fsdp_min_size=64), 15
    config.logging.every, config.checkpoint.every = 3, 5
    loop.train(config, tmp_path)
    config.mesh, config.steps, config.logging.every = MeshConfig(), 20, 1
    moved = loop.train(config, tmp_path)
    assert [record["step"] for record in moved] == [3, 5, 6, 9, 10, 12, *range(15, 21)]
    expected = {record["step"]: record for record in records}
    for record in moved:
        for name in {"train/loss", "eval/loss"} & set(record):
            assert record[name] == pytest.approx(expected[record["step"]][name], rel=1e-5)
    assert "eval/loss" in moved[1] and "eval/loss" in moved[-1]
    assert expected[20]["train/loss"] < expected[1]["train/loss"]


def test_nonfinite_loss_stops_and_names_the_last_good_checkpoint(alone, tmp_path):
    config, workdir, _ = copy.deepcopy(alone)
    config.steps = 22
    shutil.copytree(workdir, tmp_path / "run")
    # The same run, but its parameters are broken after the checkpoint of step 20.
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(loop.DivergedError) as error,
    ):
        restore = Run.restore
        patch.setattr(Run, "restore", lambda *a: _with_nan(restore(*a)))
        patch.setattr(loop, "_restored", lambda run, *a: run.restore(*a))
        loop.train(config, tmp_path / "run")
    assert Checkpoints(tmp_path / "run" / "checkpoints").newest_good() == 20
    message = str(error.value)
    assert message.startswith("step 21: the loss is not finite, which a too large optimizer.learn")
    assert "checkpoint is step 20 in" in message and len(message) < 500
    details = json.loads((tmp_path / "run" / "not_finite_21.json").read_text())
    assert "router/1/entropy" in details


def test_a_checkpoint_with_broken_parameters_is_refused(alone, tmp_path):
    """As versions before 0.2 could write one."""
    config, workdir, _ = copy.deepcopy(alone)
    config.steps = 22
    shutil.copytree(workdir, tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError) as error:
        restore = Run.restore
        patch.setattr(Run, "restore", lambda *a: _with_nan(restore(*a)))
        loop.train(config, tmp_path / "run")
    assert "checkpoint step 20 of this run holds parameters that are not finite" in str(error.value)


def _with_nan(state):
    parameters = {**state.parameters, "norm": {"scale": state.parameters["norm"]["scale"] * np.nan}}
    return dataclasses.replace(state, parameters=parameters)


def test_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(finished, tmp_path, caplog):
    workdir, _ = finished
    (tmp_path / "config.json").write_bytes((workdir / "config.json").read_bytes())
    shutil.copytree(workdir / "checkpoints", tmp_path / "checkpoints")
    payload = max(
        (p for p in (tmp_path / "checkpoints" / "120").rglob("*") if p.is_file()),
        key=lambda p: p.stat().st_size,
    )
    flipped = bytearray(payload.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    payload.write_bytes(flipped)
    with caplog.at_level(logging.WARNING):
        assert Trained.load(tmp_path).step == 60
    assert any("step 120" in r.message and payload.name in r.message for r in caplog.records)


def test_a_resumed_run_skips_the_same_step_and_ends_with_the_same_expert_bias(
    data_dir, tmp_path, caplog, monkeypatch
):
    """DeepSeek-V3's bias is outside the optimizer; step 3, of which the loss is NaN, spares it."""
    config = tiny_config(data_dir)
    config.model.moe.router = DeepSeekV3(k=1, groups=1, groups_per_token=1, bias_rate=0.01)
    config.skip_nonfinite, config.mesh = True, MeshConfig()
    config.steps, config.checkpoint.every = 4, 2
    task = type(config.task)
    original = task.training_loss

    def broken_at_step_3(self, model, batch, key):
        loss, step_metrics = original(self, model, batch, key)
        third = jax.random.fold_in(noise_key(config.seed), 2)
        same = (jax.random.key_data(key) == jax.random.key_data(third)).all()
        bad = jax.numpy.where(same, jax.numpy.nan, 1.0)
        return loss * bad, {**step_metrics, "loss": step_metrics["loss"] * bad}

    def final_state(folder):
        run = Run.build(config)
        with jax.set_mesh(run.mesh):
            return jax.device_get(run.restore(Checkpoints(folder / "checkpoints"), 4))

    monkeypatch.setattr(task, "training_loss", broken_at_step_3)
    with caplog.at_level(logging.WARNING):
        records = loop.train(config, tmp_path / "whole")
        shutil.copytree(tmp_path / "whole", tmp_path / "parts")
        shutil.rmtree(tmp_path / "parts" / "checkpoints" / "4")
        loop.train(config, tmp_path / "parts")
    assert records[-1]["step"] == 4 and np.isfinite(records[-1]["eval/loss"])
    assert [r.message for r in caplog.records if "skipped" in r.message] == [
        "step 3: the loss is not finite; its update is skipped",
        "1 of 4 updates were skipped; the learning rate went by the others, and ended where step 3 has "
        "it.",
    ] * 2
    rates = [record["train/learning_rate"] for record in records]
    schedule = config.optimizer.learning_rate_at(config.steps)
    assert rates == pytest.approx(
        [float(schedule(done)) for done in (1, 2)]
    )  # After steps 2 and 4.
    whole, parts = final_state(tmp_path / "whole"), final_state(tmp_path / "parts")
    (bias,) = jax.tree.leaves(whole.variables)
    # Three steps of +-0.01, or of 0 at exactly the mean load; a fourth would make it even.
    assert bias.shape == (1, 4) and (np.round(bias / 0.01) % 2 == 1).any()
    jax.tree.map(np.testing.assert_array_equal, parts, whole)
