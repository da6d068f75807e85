"""What the user reads when something is wrong: one sentence, with field, value and remedy."""

import json
import pathlib
import sys
from unittest import mock

import jax
import pytest
from absl import flags
from ml_collections import config_flags

from moe_jax import command_line, configuration
from moe_jax.dispatch.dropless import Dropless, Wire
from moe_jax.errors import UserError
from moe_jax.models.stack import Remat
from moe_jax.parallel.mesh import make_mesh
from moe_jax.routing.token_choice import TopK
from moe_jax.training import experiment, loop
from tests.tiny import tiny_config

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = str(ROOT / "tests/bad_input/config.py")


def parse(*arguments: str):
    """The config that a script with --config sees."""
    values = flags.FlagValues()
    config = config_flags.DEFINE_config_file("config", flag_values=values)
    flags.DEFINE_integer("steps", None, "", flag_values=values)
    argv = ["script", *arguments]
    with mock.patch.object(sys, "argv", argv):  # Where ml_collections looks for overrides.
        command_line.parse_flags(argv, values)
    return config.value


def one_sentence(message: str) -> bool:
    return "\n" not in message and message.endswith(".") and message.count(". ") == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([f"--config={CONFIG}", "--stepz=3"], ["stepz", "steps"]),
        ([f"--config={CONFIG}", "--steps=ten"], ["steps", "ten"]),
        (
            [f"--config={CONFIG}", "--config.model.widht=64"],
            ["--config.model.widht", "no field 'widht'; the nearest is 'width'", "mlp_width"],
        ),
        (
            [f"--config={CONFIG}", "--config.model.moe.router.q=2"],
            ["config.model.moe.router has no field 'q'", "renormalize"],
        ),
        ([f"--config={CONFIG}", "--config.model.width=wide"], ["config.model.width", "wide"]),
        ([f"--config={CONFIG}", "--config.model.width=1.5"], ["config.model.width", "1.5"]),
        (
            [f"--config={CONFIG}", "--config.model.dtype=float8"],
            ["config.model.dtype", "float8", "float32", "bfloat16"],
        ),
        (["--config=configs/missing.py"], ["configs/missing.py"]),
    ],
)
def test_command_line(arguments, words):
    with pytest.raises(UserError) as error:
        command_line.experiment(parse(*arguments))
    for word in words:
        assert word in str(error.value)
    assert one_sentence(str(error.value)), error.value


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("steps", 0, ["steps is 0", "at least 1"]),
        ("seed", -1, ["seed is -1", "in [0, 4294967296)"]),
        ("steps", "many", ["config.steps is 'many'", "int"]),
        ("model.num_experts", 6, ["model.num_experts is 6", "4 devices", "expert"]),
        ("model.moe.router.k", 9, ["router.k is 9", "8 experts", "between 1 and"]),
        ("model.moe.router.k", 0, ["router.k is 0", "8 experts"]),
        ("model.moe.router", "Switch", ["config.model.moe.router is 'Switch'", "Router"]),
        ("model.moe.capacity.train_factor", 0.0, ["train_factor is 0.0", "zero capacity", "1.25"]),
        ("model.moe.capacity.train_factor", float("inf"), ["train_factor is inf", "finite"]),
        ("model.init_scale", -1.0, ["model.init_scale is -1.0", "above 0"]),
        ("model.moe.group_size", 600, ["moe.group_size is 600", "8192 tokens", "512 works"]),
        ("model.moe.group_size", 4096, ["2 groups", "4096", "8 shards", "1024 works"]),
        ("microbatches", 0, ["microbatches is 0", "at least 1"]),
        ("microbatches", 3, ["microbatches is 3", "data.batch_size=64"]),
        ("microbatches", 16, ["data.batch_size / microbatches is 4", "8 devices"]),
        ("microbatches", 8, ["model.moe.group_size=512", "2 groups", "a microbatch", "8 shards"]),
        ("mesh.data", 64, ["mesh data=64", "256 devices", "there are 8", "mesh.host_devices"]),
        ("mesh.expert", 0, ["mesh.expert is 0", "at least 1"]),
        ("data.batch_size", 63, ["data.batch_size is 63", "8 devices", "data x expert"]),
        ("mesh.expert", 3, ["data.batch_size is 64", "6 devices", "data x expert"]),
        ("data.sequence_length", 256, ["data.sequence_length is 256", "128", "max_length"]),
        ("model.vocab_size", 200, ["model.vocab_size is 200", "259"]),
        ("model.num_layers", 3, ["model.moe_every is 2", "num_layers=3", "divisor"]),
        ("optimizer.learning_rate", 0.0, ["learning_rate is 0.0", "above 0"]),
        ("optimizer.warmup_steps", -1, ["warmup_steps is -1", "at least 0"]),
        ("data.dataset", "wikipedia", ["wikipedia", "python_library", "TensorFlow"]),
        ("data.dataset", "./nowhere", ["./nowhere", "dataset_info.json"]),
    ],
)
def test_config(field, value, words, tmp_path):
    config = parse(f"--config={CONFIG}")
    config.steps = 1  # Should a value be taken, against all expectation.
    owner = config
    *path, name = field.split(".")
    for part in path:
        owner = getattr(owner, part)
    setattr(owner, name, value)
    if field == "mesh.data":  # More rows and groups, so that only the devices are too few.
        config.data.batch_size, config.model.moe.group_size = 256, 128
    with pytest.raises(UserError) as error:
        loop.train(config, tmp_path)
    for word in words:
        assert word in str(error.value)
    assert one_sentence(str(error.value)), error.value
    assert not list(tmp_path.iterdir())


def test_mesh_on_too_few_devices_names_their_kind():
    config = parse(f"--config={CONFIG}").mesh
    config.data = 16
    with pytest.raises(
        UserError, match=f"64 devices but there are 8 .{jax.devices()[0].device_kind}"
    ):
        make_mesh(config)


@pytest.fixture(scope="module")
def four_steps(data_dir, tmp_path_factory):
    """A workdir of four steps."""
    config = tiny_config(data_dir)
    config.steps = 4
    workdir = tmp_path_factory.mktemp("four_steps")
    loop.train(config, workdir)
    return workdir


def test_workdir_of_another_run(data_dir, four_steps):
    config = tiny_config(data_dir)
    config.model.width, config.seed = 32, 5
    with pytest.raises(UserError) as error:
        loop.train(config, four_steps)
    for word in ["config.model.width (the run has 16, you ask for 32)", "config.seed", "--workdir"]:
        assert word in str(error.value)


def test_a_run_goes_on_with_what_saves_memory_on_another_machine(tmp_path):
    config = tiny_config("data")
    config.model.moe.dispatch = Dropless()
    record = {"config": configuration.encode(config)}
    (tmp_path / "config.json").write_text(json.dumps(record))
    config.microbatches, config.model.remat = 4, Remat.FULL
    config.model.moe.dispatch.buffer_factor = 1.25
    experiment.check_continues(tmp_path, config)
    config.model.moe.dispatch.wire = Wire.BFLOAT16
    with pytest.raises(
        UserError, match=r"another run: config\.model\.moe\.dispatch\.wire .the run"
    ):
        experiment.check_continues(tmp_path, config)


def test_steps_that_are_done_already(data_dir, four_steps):
    config = tiny_config(data_dir)
    config.steps = 3
    with pytest.raises(UserError, match=r"steps is 3, but the run in .* has done 4 already"):
        loop.train(config, four_steps)


def test_text_of_another_python(data_dir, four_steps, tmp_path):
    record = json.loads((four_steps / "config.json").read_text())
    record["dataset"]["sha256"] = "0" * 64
    (tmp_path / "config.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"began with 000000000000; use a new --workdir"):
        loop.train(tiny_config(data_dir), tmp_path)


def test_router_that_config_json_could_not_name(data_dir, tmp_path):
    class Unlisted(TopK):
        pass

    config = tiny_config(data_dir)
    config.model.moe.router = Unlisted()
    with pytest.raises(UserError, match="Unlisted is defined inside a function"):
        loop.train(config, tmp_path)


def test_workdir_without_a_run(tmp_path):
    with pytest.raises(UserError, match=r"has no config\.json; name the folder of a run"):
        experiment.load(tmp_path)
