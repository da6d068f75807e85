"""Numbers that are not finite never become a good checkpoint, and what is said of them is true."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax.analysis import figures
from moe_jax.errors import UserError
from moe_jax.tasks.language_modeling import LanguageModeling
from moe_jax.training import loop
from moe_jax.training.checkpoints import Checkpoints
from moe_jax.training.optimizers import AdamW, Schedule
from moe_jax.training.step import all_finite, noise_key
from moe_jax.training.trained import Trained
from tests.training.one_block import get_config


@pytest.fixture
def config(data_dir):
    config = get_config()
    config.data.data_dir, config.steps, config.checkpoint.every = data_dir, 6, 2
    return config


def with_infinite_updates(patch: pytest.MonkeyPatch) -> None:
    """What AdamW asks for is infinite, while its state is as it would be."""
    scaling = AdamW.scaling

    def infinite(self, axes):
        real = scaling(self, axes)

        def update(*arguments):
            updates, state = real.update(*arguments)
            return jax.tree.map(lambda leaf: leaf * jnp.inf, updates), state

        return optax.GradientTransformation(real.init, update)

    patch.setattr(AdamW, "scaling", infinite)


def test_an_update_that_is_not_finite_stops_the_run_and_is_not_saved(config, tmp_path):
    config.optimizer = AdamW(
        learning_rate=3e38, schedule=Schedule.CONSTANT, warmup_steps=0, weight_decay=10.0
    )
    config.checkpoint.every = 1
    with pytest.raises(loop.DivergedError) as error:
        loop.train(config, tmp_path)
    message = str(error.value)
    assert message.startswith("step 1: a parameter is not finite, though loss and gradient are")
    assert "optimizer.learning_rate=3e+38" in message and len(message) < 500
    details = json.loads((tmp_path / "not_finite_1.json").read_text())
    assert np.isfinite([details["train/loss"], details["train/gradient_norm"]]).all()
    assert Checkpoints(tmp_path / "checkpoints").steps() == []


def test_with_skips_good_checkpoints_stay_good_and_a_limit_ends_the_run(config, tmp_path):
    loop.train(config, tmp_path)
    good = Trained.load(tmp_path).parameters
    config.steps, config.skip_nonfinite, config.skip_limit = 30, True, 4
    with pytest.MonkeyPatch.context() as patch, pytest.raises(loop.DivergedError) as error:
        with_infinite_updates(patch)
        loop.train(config, tmp_path)
    message = str(error.value)
    assert message.startswith(
        "step 10: after skip_limit=4 skipped updates in a row a parameter is not finite, though"
    )
    assert "the last good checkpoint is step 6 in" in message
    kept = Trained.load(tmp_path)
    assert kept.step == 6  # After skipped updates nothing is saved.
    jax.tree.map(np.testing.assert_array_equal, kept.parameters, good)
    # As soon as the cause is gone the run goes on, at the rate of the updates that it has done.
    config.steps = 10
    records = loop.train(config, tmp_path)
    schedule = config.optimizer.learning_rate_at(config.steps)
    rates = {record["step"]: record["train/learning_rate"] for record in records}
    expected = {1: 0, 6: 5, 7: 6, 8: 7, 10: 9}
    assert {step: rates[step] for step in expected} == {
        step: pytest.approx(float(schedule(done))) for step, done in expected.items()
    }


def test_a_checkpoint_waits_for_an_update_that_is_done(config, tmp_path, monkeypatch):
    config.skip_nonfinite = True
    original = LanguageModeling.training_loss

    def broken_at_step_2(self, model, batch, key):
        loss, measured = original(self, model, batch, key)
        second = jax.random.fold_in(noise_key(config.seed), 1)
        same = (jax.random.key_data(key) == jax.random.key_data(second)).all()
        return loss * jnp.where(same, jnp.nan, 1.0), measured

    monkeypatch.setattr(LanguageModeling, "training_loss", broken_at_step_2)
    assert loop.train(config, tmp_path)[-1]["step"] == 6
    assert Checkpoints(tmp_path / "checkpoints").steps() == [3, 4, 6]


def test_a_gradient_that_vanished_is_said(config, tmp_path, caplog):
    with pytest.MonkeyPatch.context() as patch:
        original = LanguageModeling.training_loss

        def without_gradient(*arguments):
            loss, measured = original(*arguments)
            return 0.0 * loss, measured

        patch.setattr(LanguageModeling, "training_loss", without_gradient)
        loop.train(config, tmp_path)
    said = [r.message for r in caplog.records if "the gradient is exactly 0" in r.message]
    assert [message.partition(":")[0] for message in said] == ["step 3", "step 6"]


def test_an_epsilon_of_zero_is_refused(config):
    config.optimizer.epsilon = 0.0
    with pytest.raises(UserError, match=r"optimizer\.epsilon is 0\.0; it must be above 0"):
        config.validate()


@pytest.mark.parametrize("number", [np.inf, -np.inf, np.nan])
def test_one_number_is_enough(number):
    good = {"a": jnp.ones((3, 3)), "b": {"c": jnp.zeros(2), "n": jnp.int32(1)}}
    assert all_finite(good) and all_finite({})
    assert not all_finite({**good, "d": jnp.array([0.0, number])})


def test_a_report_is_drawn_of_what_there_is(tmp_path):
    records = [
        {"step": 1, "train/loss": None, "eval/loss": None, "router/1/load": [1.0, None]},
        {"step": 2, "train/loss": 1.0},
    ]
    for there in (records, records[1:], []):
        figures.save_run_report(there, [1], "run", tmp_path / "report.png")
        assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
