"""The commands of the README, with fewer steps."""

import json
import pathlib
import subprocess
import sys

PROJECT = pathlib.Path(__file__).parents[1]


def moe_jax(*arguments: str) -> str:
    command = [sys.executable, "-m", "moe_jax", *arguments]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_train_evaluate_and_generate(tmp_path: pathlib.Path) -> None:
    data, run = f"--config.data.data_dir={tmp_path}", f"--workdir={tmp_path / 'run'}"
    named = "--import=my_project.config"
    trained = moe_jax("train", "--config=my_project/config.py", data, run, "--steps=60")
    loss = float(trained.split("held-out loss ")[1].split(",")[0])
    assert loss < 2.8  # Uniform letters have 5.6 nats.
    evaluated = json.loads(moe_jax("evaluate", run, named, "--format=json"))
    assert abs(evaluated["eval/loss"] - loss) < 1e-3
    assert {"eval/loss/plus", "eval/loss/minus"} <= evaluated.keys()
    text = moe_jax("generate", run, named, "--prompt=four plus three is ", "--temperature=0")
    assert text.startswith("four plus three is ")
    logged = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert "router/0/temperature" in json.loads(logged[-1])


def test_without_the_import_the_error_says_what_to_write(tmp_path: pathlib.Path) -> None:
    data, run = f"--config.data.data_dir={tmp_path}", f"--workdir={tmp_path / 'run'}"
    moe_jax("train", "--config=my_project/config.py", data, run, "--steps=1")
    command = [sys.executable, "-m", "moe_jax", "evaluate", run]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "my_project.cosine:Cosine" in done.stderr and "--import=" in done.stderr


def test_published_configs_are_in_the_package(tmp_path: pathlib.Path) -> None:
    """The quickstart's config, from the wheel, in a folder with nothing in it."""
    command = [
        *(sys.executable, "-m", "moe_jax", "train", "--config=configs/quickstart.py"),
        *(f"--workdir={tmp_path / 'run'}", f"--config.data.data_dir={tmp_path}", "--steps=2"),
        "--config.evaluation.batches=1",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "report.png").exists()
