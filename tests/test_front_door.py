"""What `import moe_jax` gives, and what it does not load before it is needed."""

import pathlib
import subprocess
import sys

import pytest

import moe_jax as moe
from moe_jax import front_door

HEAVY = {"tensorflow_datasets", "orbax.checkpoint", "PIL", "matplotlib", "grain", "tensorboardX"}


def loaded_after(statement):
    """Modules in a new process after a statement; lazy ones that nobody used do not count."""
    code = (
        f"{statement}\nimport sys\nprint(*[name for name, module in sys.modules.items() "
        "if type(module).__name__ == 'module'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_loads_neither_jax_nor_anything_heavy():
    loaded = loaded_after("import moe_jax")
    assert not loaded & {"jax", "flax", "numpy", *HEAVY}


def test_the_layer_loads_jax_and_flax_alone():
    loaded = loaded_after("import moe_jax; moe_jax.MoE, moe_jax.Switch, moe_jax.Losses")
    assert {"jax", "flax"} <= loaded and not loaded & HEAVY
    ours = {name for name in loaded if name.startswith("moe_jax.")}
    floors = ("moe_jax.data", "moe_jax.training", "moe_jax.models", "moe_jax.tasks")
    assert not any(name.startswith(floors) for name in ours), ours


def test_training_loads_neither_figures_nor_accounting_nor_pods():
    loaded = loaded_after("import moe_jax; moe_jax.train, moe_jax.Experiment, moe_jax.evaluate")
    assert "moe_jax.training.loop" in loaded and not loaded & HEAVY
    above = ("moe_jax.analysis", "moe_jax.pods", "moe_jax.reproduction")
    assert not any(name.startswith(above) for name in loaded)


def test_there_are_few_names_and_each_is_documented():
    names = front_door.public_names()
    assert 25 <= len(names) <= 45
    for name in names:
        assert getattr(moe, name).__doc__, name


def test_an_unknown_name_is_an_error():
    with pytest.raises(AttributeError, match="no attribute 'Swich'"):
        _ = moe.Swich


def test_the_page_is_written_from_the_names():
    page = pathlib.Path(__file__).parents[1] / "docs" / "api.md"
    assert page.read_text() == front_door.api_page(), "run experiments/api_table.py"
