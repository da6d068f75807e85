"""Classes of one's own: found by module and name, never imported for what a file says."""

import dataclasses
import json
import pathlib
import pickle
import subprocess
import sys
import textwrap

import pytest

import moe_jax as moe
from moe_jax import component, configuration
from moe_jax.data.pipelines import TextData
from moe_jax.reproduction.runs import RunFolder
from moe_jax.training import experiment
from tests.scripts import ROOT, environment, script
from tests.tiny import tiny_config


@dataclasses.dataclass
class TopK(moe.TopK):
    """The library's name, another class."""

    temperature: float = 2.0


class Undecorated(moe.TopK):
    temperature: float = 2.0


def through_json(config, origins=None):
    return configuration.decode(json.loads(json.dumps(configuration.encode(config))), origins)


def test_two_classes_of_one_name_coexist():
    ours, theirs = TopK(k=2, temperature=3.0), moe.TopK(k=2)
    assert configuration.encode(ours)["type"] == f"{__name__}:TopK"
    assert configuration.encode(theirs)["type"] == "moe_jax.routing.token_choice:TopK"
    assert type(through_json(ours)) is TopK and through_json(ours) == ours
    assert type(through_json(theirs)) is moe.TopK and through_json(theirs) == theirs


def test_components_are_hashed_by_value():
    config = moe.MoEConfig(router=moe.Switch(), experts=moe.FeedForwardForm(gated=True))
    same = moe.MoEConfig(router=moe.Switch(), experts=moe.FeedForwardForm(gated=True))
    assert config == same and hash(config) == hash(same)
    assert hash(TextData(domain_weights={"a": 1.0})) == hash(TextData(domain_weights={"a": 1.0}))
    assert {config: 1}[same] == 1
    assert config != moe.MoEConfig(router=moe.TopK())


def test_a_class_that_nobody_could_find_again_is_refused():
    @dataclasses.dataclass
    class Local(moe.TopK):
        pass

    @dataclasses.dataclass
    class Stranger:
        size: int = 1

    for value, message in (
        (Local(), "Local is defined inside a function"),
        (Undecorated(), "Undecorated has fields but is no dataclass"),
        (Stranger(), "Stranger is (no component|defined inside)"),
    ):
        with pytest.raises(moe.UserError, match=message):
            configuration.encode(value)


HOSTILE = [
    "subprocess:Popen",
    "os:system",
    "antigravity:Nothing",
    "moe_jax.training.run:Run",
    "moe_jax.configuration:decode",
    "moe_jax.command_line:component.import_named",
    "moe_jax.__main__:main",
    "moe_jax.../tests:TopK",
    "moe_jax.no.such:Thing",
    "..:TopK",
    "builtins:dict",
    "dataclasses:Field",
    "",
    ":",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_tag_imports_and_builds_nothing_but_components(name):
    with pytest.raises(moe.UserError, match=r"config\.json names"):
        configuration.decode({"type": name, "args": ["true"]})
    assert "antigravity" not in sys.modules and "moe_jax.__main__" not in sys.modules


@pytest.mark.parametrize("tag", [3, None, ["TopK"], {"a": 1}])
def test_a_tag_that_is_no_text_is_refused(tag):
    with pytest.raises(moe.UserError, match="a type is a string"):
        configuration.decode({"type": tag})


@pytest.mark.parametrize(
    "tree",
    [
        {"type": "moe_jax.routing.router:Router"},
        {"type": "moe_jax.models.interface:ModelConfig"},
        {"type": "moe_jax.component:Component", "x": 1},
    ],
)
def test_what_cannot_be_made_is_one_sentence(tree):
    with pytest.raises(moe.UserError, match=r"cannot be made|does not have"):
        configuration.decode(tree)


@pytest.mark.parametrize("origins", [[], "x", {"own": 3}, {"own": {"file": 3}}, {"own": []}])
def test_origins_of_a_strangers_file_may_be_anything(origins):
    with pytest.raises(moe.UserError, match=r"own:Cls, which is not in moe_jax.*--import=own"):
        configuration.decode({"type": "own:Cls"}, origins)


@pytest.mark.parametrize(
    "text", ["{}", "[]", "null", '{"config": 3}', '{"config": {"a": 1}}', "\xff"]
)
def test_a_config_json_that_is_none_is_one_sentence(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(moe.UserError, match=r"config\.json"):
        experiment.load(tmp_path)


ROUTER = """
import dataclasses
import moe_jax as moe

@dataclasses.dataclass
class TopK(moe.TopK):
    '''Has the library's name and is the worst choice instead of the best.'''

    def ranking(self, logits, inputs):
        return -logits

@dataclasses.dataclass
class Watched(moe.TopK):
    def choose(self, parameters, inputs, num_experts):
        choice = super().choose(parameters, inputs, num_experts)
        largest = moe.Mean.of(choice.probabilities.max(axis=1), inputs.mask)
        return dataclasses.replace(choice, statistics={"largest": largest})
"""


def test_a_class_is_imported_by_file_and_found_by_its_tag(tmp_path, caplog):
    path = tmp_path / "own_router_a.py"
    path.write_text(ROUTER)
    tree = {"type": "own_router_a:Watched", "k": 2}
    with pytest.raises(moe.UserError, match=r"--import=own_router_a \(in Python: import it first"):
        configuration.decode(tree)
    module = component.import_named(str(path))
    assert component.import_named(str(path)) is module
    router = configuration.decode(tree)
    assert type(router) is module.Watched and router.k == 2
    origins = component.origins({type(router), moe.TopK})
    assert set(origins) == {"own_router_a"} and origins["own_router_a"]["file"] == str(path)
    path.write_text(ROUTER + "\n# Another text.\n")
    configuration.decode(tree, origins)
    assert "own_router_a.py is not what it was" in caplog.text


def test_what_cannot_be_imported_is_said(tmp_path):
    broken = tmp_path / "own_router_b.py"
    broken.write_text("def (")
    other = tmp_path / "json.py"
    other.write_text("")
    for name, message in (
        ("no_such_module_at_all", "no module no_such_module_at_all"),
        (str(tmp_path / "missing.py"), "is no file"),
        (str(broken), "cannot be imported"),
        (str(other), "a module named json is loaded already"),
    ):
        with pytest.raises(moe.UserError, match=message):
            component.import_named(name)


def test_a_notebooks_class_is_found_in_the_module_it_moved_to(tmp_path):
    path = tmp_path / "own_router_c.py"
    path.write_text(ROUTER.replace("Watched", "Moved"))
    module = component.import_named(str(path))
    assert type(configuration.decode({"type": "__main__:Moved"})) is module.Moved


def test_a_class_that_may_be_one_of_two_is_refused(tmp_path):
    for name in ("own_router_g", "own_router_h"):
        path = tmp_path / f"{name}.py"
        path.write_text(ROUTER.replace("Watched", "Twice"))
        component.import_named(str(path))
    with pytest.raises(moe.UserError, match="may be that of own_router_g or of own_router_h"):
        configuration.decode({"type": "__main__:Twice"})
    found = configuration.decode({"type": "own_router_g:Twice"})
    assert type(found).__module__ == "own_router_g"


CONFIG = (
    ROUTER
    + """
from tests.tiny import tiny_config

def get_config():
    config = tiny_config({data_dir!r})
    config.steps = 4
    config.model.moe.router = {router}
    return config
"""
)


@pytest.fixture(scope="module")
def own_run(data_dir, tmp_path_factory):
    """Trained by train.py with a class of the config file that has the name of a library class."""
    folder = tmp_path_factory.mktemp("own")
    config = folder / "own_config.py"
    config.write_text(CONFIG.replace("{data_dir!r}", repr(data_dir)).replace("{router}", "TopK()"))
    done = script("train", f"--config={config}", f"--workdir={folder / 'run'}")
    assert done.returncode == 0, done.stderr
    return folder, float(done.stdout.split("held-out loss ")[1].split(",")[0])


def test_a_class_with_a_librarys_name_is_never_replaced_by_the_librarys(own_run):
    folder, trained_loss = own_run
    record = json.loads((folder / "run" / "config.json").read_text())
    assert record["config"]["model"]["moe"]["router"]["type"] == "own_config:TopK"
    refused = script("evaluate", f"--workdir={folder / 'run'}")
    assert refused.returncode == 2
    assert f"--import={folder / 'own_config.py'}" in refused.stderr
    assert "Traceback" not in refused.stderr
    evaluated = script(
        "evaluate",
        f"--workdir={folder / 'run'}",
        f"--import={folder / 'own_config.py'}",
        "--routing",
        "--format=json",
    )
    assert evaluated.returncode == 0, evaluated.stderr
    assert json.loads(evaluated.stdout)["eval/loss"] == pytest.approx(trained_loss, abs=1e-4)


def test_it_generates_and_goes_on(own_run):
    folder, _ = own_run
    named = f"--import={folder / 'own_config.py'}"
    generated = script("generate", f"--workdir={folder / 'run'}", named, "--max_new_tokens=4")
    assert generated.returncode == 0, generated.stderr
    more = script(
        "train", f"--config={folder / 'own_config.py'}", f"--workdir={folder / 'run'}", "--steps=6"
    )
    assert more.returncode == 0 and "step 6" in more.stdout, more.stderr


def test_a_routers_own_statistics_are_logged(data_dir, tmp_path):
    path = tmp_path / "own_router_d.py"
    path.write_text(ROUTER)
    config = tiny_config(data_dir)
    config.steps, config.model.moe.router = 2, component.import_named(str(path)).Watched()
    records = moe.train(config, tmp_path / "run")
    assert 0.25 <= records[-1]["router/1/largest"] <= 1
    assert experiment.load(tmp_path / "run").model.moe.router == config.model.moe.router


def test_a_statistic_with_a_common_name_is_refused(data_dir, tmp_path):
    path = tmp_path / "own_router_e.py"
    path.write_text(ROUTER.replace('"largest"', '"load"'))
    config = tiny_config(data_dir)
    config.model.moe.router = component.import_named(str(path)).Watched()
    with pytest.raises(moe.UserError, match="own statistic is named 'load'"):
        moe.train(config, tmp_path / "run")


def test_another_process_of_a_suite_gets_a_class_from_its_file(tmp_path):
    path = tmp_path / "own_router_f.py"
    path.write_text(ROUTER)
    config = tiny_config("")
    config.model.moe.router = component.import_named(str(path)).Watched(k=2)
    pickled = pickle.dumps(RunFolder(config, tmp_path / "run"))
    code = (
        "import pickle, sys; folder = pickle.loads(sys.stdin.buffer.read());"
        "print(folder.config.model.moe.router)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=pickled, capture_output=True, cwd=ROOT
    )
    assert done.stdout.startswith(b"Watched(k=2"), done.stderr


def test_a_script_of_ones_own_trains_and_opens_its_run(data_dir, tmp_path):
    """A class of `__main__` gets the tag of its file."""
    path = tmp_path / "own_script.py"
    path.write_text(
        CONFIG.replace("{data_dir!r}", repr(data_dir)).replace("{router}", "TopK()")
        + textwrap.dedent(f"""
            moe.train(get_config(), {str(tmp_path / "run")!r})
            print(type(moe.load({str(tmp_path / "run")!r}).run.config.model.moe.router).__module__)
        """)
    )
    done = subprocess.run(
        [sys.executable, str(path)],
        capture_output=True,
        text=True,
        env={**environment(), "PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "8"},
    )
    assert done.stdout.strip().endswith("__main__"), done.stderr
    record = json.loads(pathlib.Path(tmp_path / "run" / "config.json").read_text())
    assert record["config"]["model"]["moe"]["router"]["type"] == "own_script:TopK"
