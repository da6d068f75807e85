"""A run's folder and its data may be a stranger's: no value in their files runs, writes or breaks."""

import json
import pathlib
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from moe_jax.data.sources import open_dataset
from moe_jax.errors import UserError
from moe_jax.training import experiment, metrics
from moe_jax.training.checkpoints import Checkpoints

FOLDER = pathlib.Path(__file__).parent / "run_0_1"
HOSTILE = [
    "../../../written", "/etc/passwd", "<script>alert(1)</script>", "evil_module:Evil",
    "evil_module.Evil", "x" * 5000, "", "\x00", "\ud800", -1, 10**30, 1e400, None, [], {}, True,
]  # fmt: skip


def places(tree: Any, path: tuple = ()) -> Iterator[tuple]:
    """The way to every value of a JSON tree, trees included; of a list the first only."""
    if path:
        yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree[:1])
    for name, value in items if isinstance(tree, (dict, list)) else ():
        yield from (
            places(value, (*path, name)) if isinstance(value, (dict, list)) else [(*path, name)]
        )


def changed(tree: Any, path: tuple, value: Any) -> Any:
    copy = json.loads(json.dumps(tree))
    node = copy
    for name in path[:-1]:
        node = node[name]
    node[path[-1]] = value
    return copy


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """A copy of the run and its data, with a module beside them that must not be imported."""
    (tmp_path / "evil_module.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    shutil.copytree(FOLDER, tmp_path / "deep/folder/run_0_1")
    yield tmp_path / "deep/folder/run_0_1"
    assert "evil_module" not in sys.modules
    outside = {path.name for path in tmp_path.iterdir()} | {p.name for p in tmp_path.glob("deep/*")}
    assert outside <= {"evil_module.py", "__pycache__", "deep", "folder"}, "written outside"


def opened_or_refused(open_it: Any, value: Any) -> None:
    """Calls it; a complaint is one sentence."""
    try:
        open_it()
    except UserError as error:
        assert str(error).endswith(".") and "\n" not in str(error).replace(str(value), ""), error


CONFIG = json.loads((FOLDER / "run/config.json").read_text())
INFO = json.loads((FOLDER / "data/dataset_info.json").read_text())
FEATURES = json.loads((FOLDER / "data/features.json").read_text())
METADATA = json.loads((FOLDER / "data/metadata.json").read_text())
MANIFEST = json.loads((FOLDER / "run/checkpoints/4/manifest.json").read_text())


def dotted(path: tuple) -> str:
    return ".".join(map(str, path))


@pytest.mark.parametrize("path", places(CONFIG), ids=dotted)
def test_config_json(stranger, path):
    file = stranger / "run/config.json"
    for value in HOSTILE:
        file.write_text(json.dumps(changed(CONFIG, path, value)))
        opened_or_refused(lambda: experiment.load(stranger / "run").validate(), value)


@pytest.mark.parametrize("path", places(MANIFEST), ids=dotted)
def test_a_manifest(stranger, path):
    file = stranger / "run/checkpoints/4/manifest.json"
    for value in HOSTILE:
        file.write_text(json.dumps(changed(MANIFEST, path, value)))
        opened_or_refused(Checkpoints(stranger / "run/checkpoints").newest_good, value)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        *(("dataset_info", path) for path in places(INFO)),
        *(("features", path) for path in places(FEATURES)),
        *(("metadata", path) for path in places(METADATA)),
    ],
    ids=lambda part: part if isinstance(part, str) else dotted(part),
)
def test_a_dataset(stranger, name, path):
    tree = {"dataset_info": INFO, "features": FEATURES, "metadata": METADATA}[name]
    file = stranger / f"data/{name}.json"

    def read() -> None:
        next(iter(open_dataset(str(stranger / "data"), "", "train")), None)

    for value in HOSTILE:
        file.write_text(json.dumps(changed(tree, path, value)))
        opened_or_refused(read, value)


@pytest.mark.parametrize("name", ["step", "train/loss", "router/1/load", "eval/loss", "../../x"])
def test_records(stranger, name):
    for value in HOSTILE:
        line = json.dumps({"step": 3, "train/loss": 1.0, name: value})
        (stranger / "run/metrics.jsonl").write_text(line + "\n")
        opened_or_refused(lambda: metrics.read(stranger / "run"), value)
