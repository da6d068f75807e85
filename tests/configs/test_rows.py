"""The rows of the config files: found by name, made of objects that nothing else has."""

import collections
import dataclasses
import importlib
import inspect
import pkgutil
import re
import sys
from unittest import mock

import pytest
from absl import flags
from ml_collections import config_flags

from moe_jax import command_line
from moe_jax.errors import UserError
from moe_jax.layers.feed_forward import Activation
from moe_jax.parallel.mesh import MeshConfig
from moe_jax.reproduction.claim import read_config
from moe_jax.training.experiment import Experiment
from moe_jax.training.rows import PodLayout, Row, chosen, pods_of
from tests.configs.every_config import CONFIGS, FOLDER
from tests.scripts import ROOT, script

# Packages whose dataclasses stand in configs.
OF_CONFIGS = ("data", "dispatch", "layers", "models", "parallel", "routing", "tasks", "training")
FILES = sorted({name.partition(":")[0] for name in CONFIGS})


def mutable_objects(value, path="config"):
    """Yields (path, object) for everything in a config that a flag or a line of Python can change."""
    if dataclasses.is_dataclass(value):
        if not type(value).__dataclass_params__.frozen:
            yield path, value
        for field in dataclasses.fields(value):
            yield from mutable_objects(getattr(value, field.name), f"{path}.{field.name}")
    elif isinstance(value, dict):
        yield path, value
        for key, item in value.items():
            yield from mutable_objects(item, f"{path}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        if isinstance(value, list):
            yield path, value
        for i, item in enumerate(value):
            yield from mutable_objects(item, f"{path}[{i}]")


def shared_objects(value):
    """Lists of the paths at which one object stands."""
    paths = collections.defaultdict(list)
    for path, item in mutable_objects(value):
        paths[id(item)].append(path)
    return [found for found in paths.values() if len(found) > 1]


@pytest.mark.parametrize("file", FILES)
def test_no_two_fields_of_a_config_share_an_object(file):
    builds = [build for name, build in CONFIGS.items() if name.partition(":")[0] == file]
    assert builds
    for build in builds:
        config = build()
        assert len(list(mutable_objects(config))) > 8
        assert shared_objects(config) == []


@pytest.mark.parametrize("file", FILES)
def test_no_two_configs_share_an_object(file):
    """Neither two calls of a row nor two rows, so that a change of one leaves the others."""
    builds = [build for name, build in CONFIGS.items() if name.partition(":")[0] == file]
    assert shared_objects([build() for build in (*builds, *builds)]) == []


def classes_of_configs():
    """Those that can be built without arguments."""
    found = set()
    for package in OF_CONFIGS:
        folder = importlib.import_module(f"moe_jax.{package}")
        for module in pkgutil.walk_packages(folder.__path__, f"{folder.__name__}."):
            for value in vars(importlib.import_module(module.name)).values():
                if isinstance(value, type) and dataclasses.is_dataclass(value):
                    found.add(value)
    return [cls for cls in found if not (inspect.isabstract(cls) or required_fields(cls))]


def required_fields(cls):
    absent = dataclasses.MISSING
    return [
        f for f in dataclasses.fields(cls) if f.default is absent and f.default_factory is absent
    ]


def test_defaults_of_the_library_share_nothing():
    classes = classes_of_configs()
    assert len(classes) > 40
    for cls in classes:
        assert shared_objects([cls(), cls()]) == [], cls


def test_the_search_for_shared_objects_finds_them():
    config = Experiment()
    config.model.moe.experts = config.model.feed_forward
    assert shared_objects(config) == [["config.model.feed_forward", "config.model.moe.experts"]]


def parse(*arguments):
    """The config that a script with --config sees."""
    values = flags.FlagValues()
    config = config_flags.DEFINE_config_file("config", flag_values=values)
    argv = ["script", *arguments]
    with mock.patch.object(sys, "argv", argv):  # Where ml_collections looks for overrides.
        command_line.parse_flags(argv, values)
    return command_line.experiment(config.value)


def test_a_flag_for_the_experts_leaves_the_dense_layers():
    config = parse(
        f"--config={FOLDER}/clark_2022.py:130m_64e", "--config.model.moe.experts.activation=relu"
    )
    assert config.model.moe.experts.activation is Activation.RELU
    assert config.model.feed_forward.activation is Activation.GELU


def test_a_flag_for_the_encoder_leaves_the_decoder():
    flag = "--config.model.encoder.moe.capacity.train_factor=3.0"
    model = parse(f"--config={FOLDER}/switch.py:base_64e", flag).model
    assert model.encoder.moe.capacity.train_factor == 3.0
    assert model.decoder.moe.capacity.train_factor == 1.25


def test_the_name_of_a_row_is_what_follows_the_colon():
    assert parse(f"--config={FOLDER}/glam.py:8b_64e") == CONFIGS["configs/glam.py:8b_64e"]()
    assert parse(f"--config={FOLDER}/olmoe.py") == CONFIGS["configs/olmoe.py:1b_7b"]()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("glam.py", r"glam\.py names no row; write --config=\S*:0_1b, or another of 0_1b, "),
        ("glam.py:", r"glam\.py names no row; .* 64b_64e\.$"),
        (
            "glam.py:64b_65e",
            r"glam\.py:64b_65e names no row of the file; the nearest is '64b_64e', and other rows",
        ),
        ("olmoe.py:x", r"olmoe\.py:x names no row of the file; its rows are 1b_7b\.$"),
    ],
)
def test_a_row_that_is_not_there_is_answered_with_those_that_are(name, words):
    with pytest.raises(UserError, match=f"^--config={FOLDER}/{words}"):
        parse(f"--config={FOLDER}/{name}")
    with pytest.raises(UserError, match=f"^--config={FOLDER}/{words}"):
        read_config(f"{FOLDER}/{name}")


@pytest.mark.parametrize("row", ["", ":64b"])
def test_a_script_prints_the_rows_and_exits_with_2(row):
    result = script("train", f"--config=configs/glam.py{row}", "--workdir=/nowhere")
    assert (result.returncode, result.stdout) == (2, "")
    assert "64b_64e" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


ROW = Row("One.", Experiment, pods=(PodLayout("v5e:2x2", MeshConfig(data=4)),))


def test_the_only_row_needs_no_name():
    assert chosen({"one": ROW}, "", "file.py") == Experiment()
    with pytest.raises(UserError, match=r"--config=file\.py names no row; write .*:one, or"):
        chosen({"one": ROW, "two": ROW}, "", "file.py")


def test_layouts_are_those_of_the_row():
    (layout,) = pods_of(f"{FOLDER}/gshard.py:2048e_36l")
    assert layout.topology == "v3:32x32"
    assert pods_of(f"{FOLDER}/gshard.py:512e_36l") == pods_of(f"{FOLDER}/quickstart.py") == ()
    with pytest.raises(UserError, match=r"gshard\.py:512e names no row"):
        pods_of(f"{FOLDER}/gshard.py:512e")


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_a_paper_says_how_a_row_is_trained(path):
    """The command in the head of the file names a row that is there."""
    module = importlib.import_module(f"configs.{path.stem}")
    if not hasattr(module, "ROWS"):
        return
    commands = re.findall(r"python experiments/train\.py --config=(\S+)", module.__doc__)
    assert commands
    for name in commands:
        assert read_config(str(ROOT / name)) == CONFIGS[name]()
    for row in module.ROWS.values():
        for text in (row.title, row.result, row.cost, row.ours, row.note):
            assert not text or text.endswith("."), row
