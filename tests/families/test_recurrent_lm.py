import dataclasses

import jax
import numpy as np
import pytest

from configs.tiny.recurrent_lm import get_config
from moe_jax.layers.moe import MoEConfig
from moe_jax.routing.noisy_top_k import HierarchicalNoisyTopK
from moe_jax.training import experiment, loop
from moe_jax.training.experiment import Evaluation
from moe_jax.training.run import Run
from moe_jax.training.trained import Trained


def small_config(data_dir):
    """The tiny config on 8 devices, with less of everything."""
    config = get_config()
    config.model = dataclasses.replace(
        config.model, max_length=32, width=32, units=32, mlp_width=32
    )
    config.model.moe = dataclasses.replace(config.model.moe, group_size=128)
    config.data = dataclasses.replace(config.data, data_dir=data_dir, sequence_length=32)
    config.optimizer = dataclasses.replace(
        config.optimizer, learning_rate=0.02, warmup_steps=5, weight_decay=0.0
    )
    config.mesh = dataclasses.replace(config.mesh, fsdp_min_size=1)
    config.steps, config.evaluation = 40, Evaluation(batches=4)
    return config


def test_learns_more_than_letter_frequencies_with_every_expert_and_gate(data_dir, tmp_path):
    config = small_config(data_dir)
    records = loop.train(config, tmp_path)
    dataset = experiment.read_record(tmp_path)["dataset"]
    assert records[-1]["eval/loss"] < dataset["trivial_loss"] - 0.1
    trained = Trained.load(tmp_path)
    assert trained.run.config == config
    with jax.set_mesh(trained.run.mesh):
        start = trained.run.initial_state().parameters
    # Without weight decay nothing moves but by its gradient.
    moved = jax.tree.map(lambda end, start: np.abs(end - start), trained.parameters, start)
    moe = moved["sigmoid_moe"]["moe"]
    check_every_expert_and_gate(moe)


@pytest.mark.slow
def test_every_expert_and_gate_of_a_hierarchy_has_a_gradient(data_dir):
    config = small_config(data_dir)
    config.model.moe = MoEConfig(HierarchicalNoisyTopK(groups=4, k=1), group_size=128)
    config.model.remat_moe = True
    run = Run.build(config)
    batch = config.data.open(config.seed).rows(0, 0, config.data.batch_size)

    def loss(parameters, batch):
        model = run.abstract_model.merge(parameters)
        return config.task.training_loss(model, batch, jax.random.key(0))[0]

    with jax.set_mesh(run.mesh):
        gradients = jax.jit(jax.grad(loss))(run.initial_state().parameters, run.put_batch(batch))
    for path, leaf in jax.tree.leaves_with_path(gradients):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, path
    check_every_expert_and_gate(jax.tree.map(np.abs, gradients["sigmoid_moe"]["moe"]))


def check_every_expert_and_gate(moe):
    """Each has an entry above 0."""
    for name in ("w_in", "w_out"):
        assert (moe[name].max(axis=(1, 2)) > 0).all(), name
    for name, leaf in moe["router"].items():
        assert (leaf.max(axis=0) > 0).all(), name
