"""The scripts as a user runs them."""

import json

import pytest

from moe_jax.models.abstract_model import AbstractModel
from moe_jax.training import experiment, metrics
from tests.scripts import script

# The quickstart's config at a size that a test can wait for.
SMALL = [
    "--config=configs/quickstart.py",
    "--steps=3",
    "--config.model.width=32",
    "--config.model.head_width=16",
    "--config.model.mlp_width=64",
    "--config.model.num_layers=2",
    "--config.model.max_length=96",
    "--config.data.sequence_length=32",
    "--config.data.batch_size=16",
    "--config.model.moe.group_size=64",
    "--config.evaluation.batches=1",
]


@pytest.fixture(scope="module")
def quickstart(data_dir, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("quickstart")
    done = script(
        "quickstart", *SMALL, f"--config.data.data_dir={data_dir}", f"--workdir={workdir}"
    )
    assert done.returncode == 0, done.stderr
    return workdir, done


def test_quickstart_prints_a_sample_a_table_and_what_it_used(quickstart):
    workdir, done = quickstart
    for words in (
        "A sample after 3 steps",
        "held-out loss (nats/byte)",
        "algorithmic FLOPs/token",
        "executed FLOPs/token",
        "dropped at the last step",
        "python_library, sha256 ",
        "devices: 2 x cpu",
        "mesh data=1 x expert=2 x model=1",
        str(workdir / "quickstart.png"),
    ):
        assert words in done.stdout, words
    assert (workdir / "quickstart.png").read_bytes().startswith(b"\x89PNG")
    assert "3/3" in done.stderr and "loss=" in done.stderr and "dropped=" in done.stderr


def test_the_dense_twin_has_no_experts(quickstart):
    workdir, _ = quickstart
    assert "experts" in str(AbstractModel.of(experiment.load(workdir / "moe").model).axes)
    assert "experts" not in str(AbstractModel.of(experiment.load(workdir / "dense").model).axes)
    moe, dense = (metrics.read(workdir / run)[-1] for run in ("moe", "dense"))
    assert moe["step"] == dense["step"] == 3
    assert metrics.dropped_fraction(dense) == 0
    assert any(name.startswith("router/") for name in moe)
    assert not any(name.startswith("router/") for name in dense)


def test_evaluate_agrees_with_training_and_prints_json_alone(quickstart):
    workdir, _ = quickstart
    done = script("evaluate", f"--workdir={workdir}/moe", "--format=json", "--mesh=data:1,expert:2")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    last = json.loads((workdir / "moe" / "metrics.jsonl").read_text().splitlines()[-1])
    assert result["step"] == 3 and result["split"] == "validation"
    assert result["eval/loss"] == pytest.approx(last["eval/loss"], rel=1e-6)
    assert result["eval/loss/documentation"] == pytest.approx(
        last["eval/loss/documentation"], rel=1e-6
    )


def test_generate_continues_prompts_of_several_lengths(quickstart):
    workdir, _ = quickstart
    arguments = [f"--workdir={workdir}/moe", "--max_new_tokens=5", "--temperature=0"]
    prompts = ["--prompt=import ", "--prompt=def f(x):\n    return"]
    done = script("generate", *arguments, *prompts, "--format=json")
    assert done.returncode == 0, done.stderr
    both = json.loads(done.stdout)
    assert [entry["prompt"] for entry in both] == ["import ", "def f(x):\n    return"]
    alone = script("generate", *arguments, prompts[1], "--format=json", "--mesh=data:1")
    assert json.loads(alone.stdout)[0] == both[1]


def test_generate_refuses_what_does_not_fit(quickstart):
    workdir, _ = quickstart
    done = script("generate", f"--workdir={workdir}/moe", "--prompt=abc", "--max_new_tokens=500")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "max_new_tokens is 500, which after a prompt of 4 tokens is more than "
        "model.max_length=96; ask for at most 93 or shorten the prompt."
    )


def test_generate_refuses_to_search_and_draw():
    done = script("generate", "--workdir=nowhere", "--beams=2", "--seed=0")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "beams is 2, which draws nothing, but seed is 0; leave one of them out."
    )
