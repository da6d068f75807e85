"""Configs that differ in numbers only share one compiled step, and each computes with its own numbers."""

import dataclasses

import jax
import numpy as np
import pytest

from moe_jax.component import Component, factors_of, field
from moe_jax.configuration import changed
from moe_jax.models.decoder_lm import DecoderLMConfig
from moe_jax.parallel.mesh import MeshConfig
from moe_jax.routing.capacity import Capacity
from moe_jax.routing.catalogue import ENTRIES
from moe_jax.routing.expert_choice import ExpertChoice
from moe_jax.routing.losses import Losses
from moe_jax.routing.token_choice import TopK
from moe_jax.training.evaluator import Evaluator
from moe_jax.training.optimizers import SGD, Adafactor, AdamW
from moe_jax.training.run import Run, broadcast_signal
from moe_jax.training.schedules import Schedule
from moe_jax.training.step import noise_key, train_step
from tests.tiny import tiny_config

ONE, EIGHT = MeshConfig(host_devices=8), MeshConfig(data=2, expert=4, fsdp_min_size=64)


def config_of(**changes):
    """The tiny config with changes of its fields."""
    return changed(tiny_config(""), changes)


def other_numbers(config):
    """The config with another seed, and other numbers wherever a number only multiplies."""
    config = changed(config, {"seed": 7})
    config.optimizer = scaled(config.optimizer, factors_of(config.optimizer))
    if isinstance(config.model, DecoderLMConfig):
        config.model.moe.router = other_router(config.model.moe.router)
    return config


def other_router(router):
    """A router with other factors, and other coefficients of the same losses."""
    losses = getattr(router, "losses", None)
    if losses is not None:
        router = dataclasses.replace(router, losses=scaled(losses, losses.coefficients))
    own = [f.name for f in dataclasses.fields(router) if f.name.endswith("_weight")]
    return scaled(router, [*factors_of(router), *own])


def scaled(component, names):
    return dataclasses.replace(
        component, **{name: 0.7 * getattr(component, name) for name in names}
    )


def lowered(config):
    run = Run.build(config)
    with jax.set_mesh(run.mesh):
        return run.train_step.lower(*run.abstract_arguments()).as_text()


def check_shared(config):
    other = other_numbers(config)
    assert other != config
    assert lowered(config) == lowered(other)


@pytest.mark.parametrize(
    "optimizer",
    [
        *(
            AdamW(learning_rate=0.01, schedule=schedule, warmup_steps=2, cooldown_steps=1)
            for schedule in Schedule
        ),
        Adafactor(learning_rate=0.02, b1=0.9),
        SGD(learning_rate=0.3, momentum=0.9),
    ],
    ids=lambda optimizer: f"{type(optimizer).__name__}-{optimizer.schedule}",
)
def test_learning_rates_share_a_step(optimizer):
    dense = {"model.num_layers": 1, "model.moe_every": 0}
    check_shared(config_of(**{"optimizer": optimizer, "mesh": ONE, **dense}))


# One entry of each class of routers.
WITH_NUMBERS = {
    type(entry.router): entry
    for entry in ENTRIES
    if entry.router.loss_coefficients or factors_of(entry.router)
}


EXPERTS_CHOOSE = next(entry for entry in ENTRIES if isinstance(entry.router, ExpertChoice))
WITH_NUMBERS[ExpertChoice] = dataclasses.replace(
    EXPERTS_CHOOSE, router=ExpertChoice(router_z_weight=1e-3)
)


@pytest.mark.parametrize("entry", WITH_NUMBERS.values(), ids=lambda entry: entry.name)
def test_coefficients_and_gate_scales_share_a_step(entry):
    check_shared(
        config_of(
            **{
                "mesh": ONE,
                "model.num_experts": 8,
                "model.moe.router": entry.router,
                "model.moe.capacity": entry.capacity or Capacity(),
                "model.accept_leak": True,
            }
        )
    )


@pytest.mark.parametrize("unroll", [False, True])
@pytest.mark.parametrize("mesh", [ONE, EIGHT], ids=["one device", "data=2 x expert=4"])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_layouts_and_microbatches_share_a_step(microbatches, mesh, unroll):
    changes = {
        "microbatches": microbatches,
        "mesh": mesh,
        "model.num_layers": 4,  # Two periods of the stack.
        "model.unroll": unroll,
        "model.moe.router.gate_scale": 4.0,
        "model.moe.group_size": 32,
    }
    check_shared(config_of(**changes))


def test_a_loss_that_is_switched_off_is_another_step():
    on = config_of(**{"mesh": ONE})
    off = changed(on, {"model.moe.router.losses": Losses()})
    assert lowered(on) != lowered(off)


def batch_of(run):
    rng = np.random.default_rng(0)
    return run.put_batch(
        {
            name: rng.integers(0, 2 if name == "domain" else 64, shape.shape).astype(shape.dtype)
            for name, shape in run.config.data.batch_shapes.items()
        }
    )


def steps(run, step, hyperparameters):
    """Parameters and auxiliary loss after two steps."""
    with jax.set_mesh(run.mesh):
        state, batch = run.initial_state(), batch_of(run)
        for _ in range(2):
            state, metrics = step(state, batch, broadcast_signal(run.mesh, 0), hyperparameters)
    return jax.device_get((state.parameters, metrics["auxiliary_loss"]))


@pytest.mark.parametrize("microbatches", [1, 2])
def test_the_shared_step_computes_with_the_numbers_it_is_given(microbatches):
    """As a step does that has the numbers of its config as constants."""
    router = TopK(k=2, gate_scale=4.0, losses=Losses(load_balancing=0.1, router_z=0.01))
    changes = {"mesh": EIGHT, "microbatches": microbatches, "model.moe.router": router}
    one = config_of(**changes, **{"model.moe.group_size": 32})
    other = dataclasses.replace(other_numbers(one), seed=one.seed)
    run, run_of_other = Run.build(one), Run.build(other)
    found = steps(run, run.train_step, run_of_other.hyperparameters)

    constants = train_step(
        run_of_other.abstract_model,
        other.task,
        run_of_other.optimizer,
        skip_nonfinite=False,
        microbatches=microbatches,
    )
    key = noise_key(other.seed)
    wanted = steps(run, jax.jit(lambda state, batch, *_: constants(state, batch, key)), None)
    same = steps(run, run.train_step, run.hyperparameters)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6), found, wanted)
    assert not np.allclose(found[1], same[1], rtol=0.05)
    for a, b in zip(jax.tree.leaves(found[0]), jax.tree.leaves(same[0]), strict=True):
        assert (a != b).any()


def test_evaluations_share_a_program(data_dir):
    config = changed(tiny_config(data_dir), {"mesh": ONE, "model.moe.router.gate_scale": 2.0})
    texts, losses = [], []
    for one in (config, other_numbers(config)):
        run, data = Run.build(config), config.data.open(0)
        evaluate = Evaluator(Run.build(one), data, config.data.held_out_split, 1)
        with jax.set_mesh(run.mesh):
            state = run.initial_state()
            losses.append(evaluate(state.parameters, state.variables)["eval/loss"])
            batch = run.put_batch(data.held_out_batches(config.data.held_out_split, 1)[0])
            arguments = (state.parameters, state.variables, batch, run.hyperparameters)
            texts.append(evaluate._step.lower(*arguments).as_text())
    assert texts[0] == texts[1]
    assert losses[0] != losses[1]


def test_factors_are_the_fields_declared_as_such():
    @dataclasses.dataclass
    class Base(Component):
        scale: float = field(1.0, above=0, factor=True)
        limit: float = field(2.0, above=0)
        name: str = ""

    @dataclasses.dataclass
    class Derived(Base):
        scale: float = 4.0

    assert factors_of(Base(scale=3.0)) == {"scale": 3.0}
    assert factors_of(Derived()) == {"scale": 4.0}
