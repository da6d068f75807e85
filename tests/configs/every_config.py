"""Every config of the project by the name that --config has for it, and what it says it is."""

import importlib
from collections.abc import Callable, Iterator

from moe_jax.training.experiment import Experiment
from tests.scripts import ROOT

FOLDER = ROOT / "configs"


def _every_config() -> Iterator[tuple[str, Callable[[], Experiment], str]]:
    for path in sorted(FOLDER.rglob("*.py")):
        file = path.relative_to(ROOT)
        if file.parts[1] == "shared":
            continue
        module = importlib.import_module(".".join(file.with_suffix("").parts))
        if hasattr(module, "ROWS"):
            for name, row in module.ROWS.items():
                yield f"{file}:{name}", row.build, row.title
        else:
            yield str(file), module.get_config, module.__doc__.partition("\n")[0]


CONFIGS = {name: build for name, build, _ in _every_config()}
TITLES = {name: title for name, _, title in _every_config()}
