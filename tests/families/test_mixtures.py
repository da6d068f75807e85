"""The mixture of Jacobs et al. (1991) on real vowels, with the ordinary trainer on 8 devices."""

import jax
import numpy as np
import pytest

from configs.tiny import mixtures
from moe_jax.data.robot_arm import RobotArm
from moe_jax.data.sources import prepare_dataset
from moe_jax.errors import UserError
from moe_jax.models.mixtures.mixture import MixtureConfig
from moe_jax.models.mixtures.objectives import Objective
from moe_jax.tasks.mixture_regression import MixtureRegression
from moe_jax.training import experiment, loop
from moe_jax.training.trained import Trained


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("vowels"))
    prepare_dataset("peterson_barney", folder)
    config = mixtures.get_config()
    config.data.data_dir, config.steps = folder, 60
    return config


def test_it_learns_and_every_part_has_a_gradient(config, tmp_path):
    records = loop.train(config, tmp_path)
    trivial = experiment.read_record(tmp_path)["dataset"]["trivial_loss"]
    assert records[-1]["eval/loss"] < 0.8 * trivial
    assert records[-1]["eval/accuracy"] > 0.7
    assert records[-1]["train/loss"] < records[0]["train/loss"]

    trained = Trained.load(tmp_path)
    batch = trained.open_data().rows(0, 0, 400)

    def loss(parameters):
        model = trained.run.abstract_model.merge(parameters)
        return config.task.training_loss(model, batch, jax.random.key(0))[0]

    gradients = jax.jit(jax.grad(loss))(trained.parameters)
    per_expert = np.abs(np.asarray(gradients["experts"])).max(axis=(1, 2))
    per_branch = np.abs(np.asarray(gradients["gates"][0])).max(axis=(0, 1))
    assert per_expert.shape == per_branch.shape == (4,)
    assert per_expert.min() > 0 and per_branch.min() > 0


def test_a_task_names_what_does_not_fit(config):
    config.model.num_outputs = 2
    with pytest.raises(UserError, match=r"model\.num_outputs is 2, but a row of the data has 1"):
        config.validate()
    config.model.num_outputs, config.model.deviations = 1, True
    config.task.objective = Objective.COOPERATIVE
    with pytest.raises(UserError, match=r"task\.objective is cooperative"):
        config.validate()


def test_accelerations_are_no_classes():
    model = MixtureConfig(num_inputs=12, num_outputs=4)
    with pytest.raises(UserError, match=r"task\.classes is true, but targets of RobotArm are not"):
        MixtureRegression().validate(model, RobotArm())
    MixtureRegression(classes=False).validate(model, RobotArm())
