"""examples/minimal.py computes what the library computes with the quickstart's config.

Beside its losses, which begin in a warm-up and have one choice per token: the schedule up to the last
step, the layer with two choices per token against the reference's loops, and the page itself.
"""

import ast
import pathlib
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.quickstart import get_config
from examples import minimal
from moe_jax import reference
from moe_jax.parallel.mesh import MeshConfig, make_mesh
from moe_jax.training.optimizers import is_decayed
from moe_jax.training.run import Run, broadcast_signal

SOURCE = pathlib.Path(minimal.__file__).read_text()
STEPS = 50
# How the library's path of each array ends, by minimal's.
LIBRARY_NAMES = {
    "table": "tokens/table",
    "stack/attention_norm": "attention_norm/scale",
    "stack/attention/qkv": "attention/qkv",
    "stack/attention/out": "attention/out",
    "stack/moe_norm": "mlp_norm/scale",
    "stack/moe/router": "mlp/router/weights",
    "stack/moe/w_in": "mlp/w_in",
    "stack/moe/w_out": "mlp/w_out",
    "norm": "norm/scale",
}


def by_path(tree, is_leaf=None):
    leaves = jax.tree.leaves_with_path(tree, is_leaf)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def renamed(tree, is_leaf=None):
    """A tree of the library's parameters as minimal's; each leaf of the one is one of the other."""
    of_library, like = by_path(tree, is_leaf), jax.eval_shape(initial)
    taken = {
        path: next(name for name in of_library if f"/{name}".endswith(f"/{end}"))
        for path, end in LIBRARY_NAMES.items()
    }
    assert sorted(taken.values()) == sorted(of_library)
    assert taken.keys() == by_path(like).keys()
    return jax.tree.map_with_path(
        lambda path, _: of_library[taken[jax.tree_util.keystr(path, simple=True, separator="/")]],
        like,
    )


def initial():
    return minimal.initial_parameters(jax.random.key(0))


class Training(NamedTuple):
    """What the library did: its run and batches, losses by step, and minimal's trees before the first
    step and after each."""

    run: Run
    batches: list
    parameters: list
    losses: list
    auxiliary_losses: list

    @property
    def before(self):
        return self.parameters[0]


@pytest.fixture(scope="module")
def library(data_dir):
    config = get_config()
    config.data.data_dir = data_dir
    config.mesh = MeshConfig(**minimal.MESH)
    data = config.data.open(config.seed)
    batches = [data.rows(step, 0, config.data.batch_size) for step in range(STEPS)]
    run = Run.build(config)
    losses, auxiliary_losses = [], []
    with jax.set_mesh(run.mesh):
        state = run.initial_state()
        parameters = [jax.device_get(renamed(state.parameters))]
        for batch in batches:
            state, metrics = run.train_step(
                state, run.put_batch(batch), broadcast_signal(run.mesh, 0), run.hyperparameters
            )
            losses.append(float(metrics["loss"]))
            auxiliary_losses.append(float(metrics["auxiliary_loss"]))
            parameters.append(jax.device_get(renamed(state.parameters)))
    return Training(run, batches, parameters, losses, auxiliary_losses)


def test_fifty_steps_are_the_librarys(library):
    """Each from the library's parameters: it rounds otherwise, and after 20 steps of one's own that sends
    a token to another expert. The moments of all steps are minimal's."""
    losses, auxiliary_losses = [], []
    with jax.set_mesh(library.run.mesh):
        moments = minimal.OPTIMIZER.init(minimal.put(library.before, library.run.mesh))
        for batch, before, after in zip(
            library.batches, library.parameters[:-1], library.parameters[1:], strict=True
        ):
            tokens = library.run.put_batch(batch)["tokens"]
            parameters = minimal.put(before, library.run.mesh)
            parameters, moments, metrics = minimal.train_step(parameters, moments, tokens)
            losses.append(float(metrics["loss"]))
            auxiliary_losses.append(float(minimal.BALANCE * metrics["balance"].sum()))
            expected = by_path(after)
            for path, value in by_path(jax.device_get(parameters)).items():
                np.testing.assert_allclose(value, expected[path], atol=2e-5, err_msg=path)
    np.testing.assert_allclose(losses, library.losses, rtol=1e-5)
    np.testing.assert_allclose(auxiliary_losses, library.auxiliary_losses, rtol=1e-5)
    # A loss that had not fallen would say little.
    assert np.mean(losses[-5:]) < losses[0] - 2


def test_parameters_start_as_the_librarys(library):
    theirs, ours = by_path(library.before), by_path(jax.device_get(initial()))
    for path, value in ours.items():
        assert value.shape == theirs[path].shape, path
        # The smallest matrix has 1,024 numbers, whose deviation has a standard error of 2%.
        assert value.std() == pytest.approx(theirs[path].std(), rel=0.1), path
        assert value.mean() == pytest.approx(theirs[path].mean(), abs=0.02), path


def test_the_schedule_and_what_decays_are_the_librarys(library):
    config = get_config()
    assert config.steps == minimal.STEPS
    steps = np.arange(config.steps + 1)
    theirs = jax.vmap(config.optimizer.learning_rate_at(config.steps))(steps)
    np.testing.assert_allclose(jax.vmap(minimal.RATE)(steps), theirs, rtol=1e-5)
    decayed = jax.tree.map(
        lambda axes: is_decayed(axes, config.optimizer.decayed),
        library.run.abstract_model.axes,
        is_leaf=lambda leaf: isinstance(leaf, tuple),
    )
    assert minimal.is_decayed(library.before) == renamed(decayed)


def test_each_device_holds_its_own_part_of_the_experts(library):
    moe = minimal.put(library.before, library.run.mesh)["stack"]["moe"]
    blocks, experts, width, expert_width = moe["w_in"].shape
    assert {shard.data.shape for shard in moe["w_in"].addressable_shards} == {
        (blocks, experts // 4, width // 2, expert_width)
    }
    assert {shard.data.shape for shard in moe["w_out"].addressable_shards} == {
        (blocks, experts // 4, expert_width, width // 2)
    }
    assert moe["router"].is_fully_replicated


@pytest.mark.parametrize("choices", [1, 2])
def test_the_layer_equals_the_loops_in_value_and_gradients(monkeypatch, choices):
    groups, tokens, width, experts = 8, 8, 8, 8
    monkeypatch.setattr(minimal, "K", choices)
    monkeypatch.setattr(minimal, "S", tokens)
    monkeypatch.setattr(minimal, "CAPACITY_FACTOR", 1.0)
    monkeypatch.setattr(minimal, "GATE_SCALE", 1.0)
    keys = jax.random.split(jax.random.key(1), 5)
    # Rows of half a group, and a router that decides.
    x = jax.random.normal(keys[0], (2 * groups, tokens // 2, width))
    parameters = {
        "router": jax.random.normal(keys[1], (width, experts)),
        "w_in": jax.random.normal(keys[2], (experts, width, 16)),
        "w_out": jax.random.normal(keys[3], (experts, 16, width)),
    }
    direction = jax.random.normal(keys[4], x.shape)

    def on_the_mesh(parameters, x):
        y, metrics = minimal.moe(parameters, x)
        return jnp.sum(y * direction) + metrics["balance"], (y, metrics)

    def in_loops(parameters, x):
        y, losses, statistics = reference.layer(
            x.reshape(-1, width),
            np.ones(groups * tokens, bool),
            **parameters,
            group_size=tokens,
            choices=choices,
            capacity=choices,  # S K / E with S = E.
        )
        metrics = {"balance": losses["load_balancing"], "dropped": statistics["dropped"]}
        y = y.reshape(x.shape)
        return jnp.sum(y * direction) + metrics["balance"], (y, metrics)

    expected = jax.grad(in_loops, argnums=(0, 1), has_aux=True)(parameters, x)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, expert=4))):
        result = jax.jit(jax.grad(on_the_mesh, argnums=(0, 1), has_aux=True))(parameters, x)
    want = by_path(expected)
    assert 0.1 < want["1/1/dropped"] < 0.9
    for path, value in by_path(result).items():
        error = np.linalg.norm(value - want[path]) / np.linalg.norm(want[path])
        assert error < 1e-5, f"{path}: relative error {error:.1e}"


def test_it_learns_from_the_text_of_pythons_library(capsys):
    losses = minimal.main(steps=40)
    assert losses[0] > np.log(256) - 0.5
    assert np.mean(losses[-5:]) < losses[0] - 1.5
    assert "step    1  balance 1." in capsys.readouterr().out


def test_the_layer_has_one_exchange_each_way():
    shapes = {
        "router": jax.ShapeDtypeStruct((minimal.d, minimal.E), jnp.float32),
        "w_in": jax.ShapeDtypeStruct((minimal.E, minimal.d, minimal.f), jnp.float32),
        "w_out": jax.ShapeDtypeStruct((minimal.E, minimal.f, minimal.d), jnp.float32),
    }
    x = jax.ShapeDtypeStruct((minimal.B, minimal.L, minimal.d), jnp.float32)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, expert=4))):
        program = str(jax.make_jaxpr(minimal.moe)(shapes, x))
    assert program.count("all_to_all[") == 2
    assert program.count("shard_map[") == 1


def test_the_page_is_short_and_needs_three_packages():
    assert len(SOURCE.splitlines()) <= 300
    imported = set()
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert imported - sys.stdlib_module_names == {"jax", "numpy", "optax"}
