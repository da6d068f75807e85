"""The layout that the README describes: who may import whom, and commands that exist."""

import ast
import pathlib
import re

import pytest

from configs.quickstart import get_config
from tests.scripts import script

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()

# From the ground floor up; a module imports only from its own floor and those before it.
FLOORS = [
    ["errors", "renamed", "reference", "huge_pages"],
    ["component", "special_functions", "published"],
    ["configuration"],
    ["parallel"],
    ["data"],
    ["routing"],
    ["dispatch"],
    ["layers"],
    ["models"],
    ["tasks", "decoding", "interop"],
    ["analysis"],
    ["training"],
    ["command_line"],
    ["pods", "reproduction"],
    ["commands"],
    ["front_door", "__main__"],
]
FLOOR_OF = {name: i for i, names in enumerate(FLOORS) for name in names}
MODULES = sorted((ROOT / "moe_jax").rglob("*.py"))


def imported_from_moe_jax(path: pathlib.Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("moe_jax"):
            parts = node.module.split(".")
            names |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_imports_what_is_above_it(path):
    own = path.relative_to(ROOT / "moe_jax").parts[0].removesuffix(".py")
    if path == ROOT / "moe_jax" / "__init__.py":
        return  # The front door loads from all floors, when a name is used; see test_front_door.py.
    for name in imported_from_moe_jax(path):
        assert FLOOR_OF[name] <= FLOOR_OF[own], f"{own} imports {name}"


def test_routing_knows_neither_flax_nor_meshes():
    for path in (ROOT / "moe_jax" / "routing").glob("*.py"):
        text = path.read_text()
        assert "import flax" not in text and "from flax" not in text
        assert not imported_from_moe_jax(path) & {"parallel", "layers"}


def shell_commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def test_readme_commands_name_targets_scripts_flags_and_fields_that_exist():
    makefile = (ROOT / "Makefile").read_text()
    commands = shell_commands()
    assert len(commands) >= 7
    for command in commands:
        program, *words = command.split("#")[0].split()
        if program == "make":
            assert re.search(rf"^{words[0]}:", makefile, flags=re.MULTILINE), command
        elif program == ".venv/bin/python" and words[0] == "-m":
            assert (ROOT / words[1].replace(".", "/")).with_suffix(".py").exists(), command
        else:
            assert program == ".venv/bin/python", command
            check_script(ROOT / words[0], command)


def check_script(path: pathlib.Path, command: str) -> None:
    source = path.read_text() + (ROOT / "moe_jax/command_line.py").read_text()
    installed = ROOT / "moe_jax/commands" / path.name
    source += installed.read_text() if installed.exists() else ""
    for flag, value in re.findall(r"--([\w.]+)=?('[^']*'|\S*)", command):
        if flag.startswith("config."):
            node = get_config()
            for part in flag.split(".")[1:]:
                node = getattr(node, part)
        elif flag == "config":
            assert (ROOT / value.partition(":")[0]).exists(), command
        else:
            assert re.search(rf'DEFINE_\w+\(\s*"{flag}"', source), f"{path.name} has no --{flag}"


def python_sources() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def python_blocks() -> list[dict]:
    """The names that each Python block of the README defines."""
    blocks = []
    for block in python_sources():
        names: dict = {"__name__": __name__}
        exec(compile(block, "README.md", "exec"), names)
        blocks.append(names)
    return blocks


def test_readme_configs_are_valid():
    configs = [names["get_config"]() for names in python_blocks() if "get_config" in names]
    assert len(configs) >= 3
    for config in configs:
        config.validate()


def test_the_readmes_layer_is_called():
    (names,) = (names for names in python_blocks() if "layer" in names)
    assert names["y"].shape == names["x"].shape


def test_the_readmes_router_trains(data_dir, tmp_path):
    """As printed: the block is the config file, whose class evaluate.py gets by --import."""
    (block,) = (block for block in python_sources() if "class Tempered" in block)
    config = tmp_path / "tempered.py"
    config.write_text(block)
    small = [
        f"--config.data.data_dir={data_dir}",
        "--config.model.num_layers=2",
        "--config.model.width=16",
        "--config.data.sequence_length=32",
        "--config.data.batch_size=8",
    ]
    run = f"--workdir={tmp_path / 'run'}"
    trained = script("train", f"--config={config}", run, "--steps=2", *small)
    assert trained.returncode == 0, trained.stderr
    evaluated = script("evaluate", run, f"--import={config}", "--batches=1")
    assert evaluated.returncode == 0, evaluated.stderr


def test_readme_has_no_gaps():
    assert "@@" not in README


def test_readme_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(links) >= 5
    for link in links:
        assert (ROOT / link).exists(), link


def test_readme_names_every_folder():
    for folder in (ROOT / "moe_jax").iterdir():
        if folder.is_dir() and folder.name != "__pycache__":
            assert f"moe_jax/{folder.name}/" in README
