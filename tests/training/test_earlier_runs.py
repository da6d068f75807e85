"""A run folder of version 0.1 (commit 9a6881b, whose config.json has bare types) is still a run."""

import json
import pathlib
import shutil

import numpy as np
import pytest

import moe_jax as moe
from moe_jax import component

FOLDER = pathlib.Path(__file__).parent / "run_0_1"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A copy, because continuing it and packing its text write files; its paths are relative."""
    place = tmp_path / "tests/training/run_0_1"
    shutil.copytree(FOLDER, place)
    monkeypatch.chdir(tmp_path)
    return place / "run"


def test_it_is_evaluated_to_the_same_loss_and_generates_the_same_text(run, caplog):
    component._SAID.clear()
    assert json.loads((run / "config.json").read_text())["config"]["type"] == "Experiment"
    trained = moe.load(run)
    said = [r.message for r in caplog.records if "read as moe_jax's own" in r.message]
    assert len(said) == 1
    np.testing.assert_allclose(trained.evaluate()["eval/loss"], EXPECTED["evaluation"], rtol=1e-5)
    texts = moe.generate(trained, ["the "], max_new_tokens=8, temperature=0)
    assert texts == EXPECTED["greedy"]


def test_it_goes_on_as_it_would_have(run):
    """Up to the noise: the run has dropout and jitter, which 0.2 draws with keys by block and role.

    So the losses after step 4 are not version 0.1's to the last digit, but within 0.5% of them, while
    they fall by 5% a step; `continued` is what 0.2 has found.
    """
    config = moe.load(run).run.config
    config.steps = 6
    records = moe.train(config, run)
    losses = [record["train/loss"] for record in records]
    np.testing.assert_allclose(losses[-2:], EXPECTED["continued"], rtol=1e-5)
    np.testing.assert_allclose(losses[-2:], EXPECTED["continued_by_0_1"], rtol=5e-3)
    written = json.loads((run / "config.json").read_text())["config"]["type"]
    assert written == "moe_jax.training.experiment:Experiment"
