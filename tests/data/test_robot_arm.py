"""The simulated arm obeys mechanics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.data import robot_arm
from moe_jax.data.robot_arm import RobotArm
from moe_jax.errors import UserError
from tests.data.shapes import assert_batch_shapes

Q = jnp.array([0.3, -0.2, 0.4, 1.1])
VELOCITY = jnp.array([0.5, -1.0, 0.8, 1.5])
TORQUES = jax.jit(robot_arm.torques)  # Op by op it would compile for half a minute.


def test_forward_dynamics_undo_inverse_dynamics():
    acceleration = jnp.array([2.0, -1.0, 0.5, 3.0])
    torque = TORQUES(Q, VELOCITY, acceleration)
    np.testing.assert_allclose(
        jax.jit(robot_arm.accelerations)(Q, VELOCITY, torque), acceleration, rtol=1e-3
    )


def test_power_is_the_change_of_energy():
    acceleration = jnp.array([2.0, -1.0, 0.5, 3.0])

    def energy(q, velocity):
        return robot_arm.kinetic_energy(q, velocity) + robot_arm.potential_energy(q)

    moved = jax.jit(lambda *at: jax.jvp(energy, at, (VELOCITY, acceleration))[1])
    change = moved(Q, VELOCITY)
    power = VELOCITY @ TORQUES(Q, VELOCITY, acceleration)
    assert float(power) == pytest.approx(float(change), rel=1e-4)


def test_a_hanging_straight_arm_is_two_rods():
    """About y, all turning together: a compound pendulum with cylinders' moments of inertia."""
    rate = jnp.array([1.0, 0.0, 0.0, 0.0])
    (m1, m2), (l1, l2), (r1, r2) = robot_arm._MASSES, robot_arm._LENGTHS, robot_arm._RADII
    inertia = m1 * (l1**2 / 3 + r1**2 / 4) + m2 * (l2**2 / 12 + r2**2 / 4 + (l1 + l2 / 2) ** 2)
    kinetic = jax.jit(robot_arm.kinetic_energy)(jnp.zeros(4), rate)
    assert float(kinetic) == pytest.approx(inertia / 2, rel=1e-5)
    lowest = jax.jit(robot_arm.potential_energy)(jnp.zeros(4))
    assert float(lowest) == pytest.approx(-9.81 * (m1 * l1 / 2 + m2 * (l1 + l2 / 2)), rel=1e-5)


def test_rows_are_standardized_and_the_seed_decides():
    config = RobotArm(train_rows=60, test_rows=20)
    tables = config.tables()
    assert tables["train"].inputs.shape == (60, 12) and tables["test"].targets.shape == (20, 4)
    for columns in (tables["train"].inputs, tables["train"].targets):
        assert columns.dtype == np.float32
        np.testing.assert_allclose(columns.mean(axis=0), 0, atol=1e-5)
        np.testing.assert_allclose(columns.std(axis=0), 1, atol=1e-5)
    again = RobotArm(train_rows=60, test_rows=20).tables()["train"]
    other = RobotArm(train_rows=60, test_rows=20, simulation_seed=1).tables()["train"]
    assert tables["train"].sha256 == again.sha256 != other.sha256
    assert config.open(seed=0).record()["trivial_loss"] == pytest.approx(4, rel=1e-3)


def test_too_few_rows_are_refused():
    with pytest.raises(UserError, match=r"data\.train_rows is 1"):
        RobotArm(train_rows=1).validate()


def test_batches_have_the_shapes_that_the_config_says():
    config = RobotArm(train_rows=60, test_rows=20, batch_size=8)
    assert_batch_shapes(config, config.open(seed=0))
