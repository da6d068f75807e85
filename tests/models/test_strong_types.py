"""A parameter of weak type changes its type in the first step, so that the second compiles again."""

import pathlib

import jax
import pytest

from moe_jax.models.abstract_model import AbstractModel
from moe_jax.reproduction.claim import read_config
from moe_jax.training.experiment import Experiment
from moe_jax.training.state import state_shapes

ROOT = pathlib.Path(__file__).parents[2]
FILES = sorted(path.relative_to(ROOT) for path in (ROOT / "configs").glob("tiny/*.py"))


@pytest.mark.parametrize("file", ["configs/quickstart.py", *map(str, FILES)])
def test_nothing_in_the_state_is_weakly_typed(file):
    config: Experiment = read_config(str(ROOT / file))
    abstract_model = AbstractModel.of(config.model)
    optimizer = config.optimizer.build(config.steps, abstract_model.axes)
    leaves = jax.tree_util.tree_leaves_with_path(state_shapes(abstract_model, optimizer))
    weak = [jax.tree_util.keystr(path) for path, leaf in leaves if leaf.weak_type]
    assert len(leaves) > 3 and not weak
