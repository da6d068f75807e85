"""A simulated robot arm of four joints in three dimensions, whose dynamics are to be learned.

Axis letters: B movements (one row is taken from each), J = 4 joints.

Jordan and Jacobs (1994, section 5) learn the forward dynamics of such an arm: from 12 inputs (the
joints' positions, velocities and torques) the 4 accelerations, with 15,000 rows to train on and
5,000 to test on. They do not print the arm's masses, lengths and movements. Assumed here: a ball
joint at the shoulder (turned about y, then x, then the upper arm) and a hinge at the elbow, two
cylinders with the mass and size of a human arm under gravity, and minimum-jerk movements (Flash and
Hogan 1985) between random postures. Torques follow from the movement by Lagrange's equation, with
derivatives by JAX.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.component import field
from moe_jax.data.tables import Table, TableConfig, TablePipeline

NUM_JOINTS = 4

# Upper arm, and forearm with hand: kg, m, m.
_MASSES = (2.0, 1.7)
_LENGTHS = (0.3, 0.35)
_RADII = (0.045, 0.035)
_GRAVITY = 9.81
# Radians and seconds, chosen so that a linear fit leaves about a third of the variance, as in the
# paper (.31). A straight elbow is far: there the inertia about the upper arm would vanish.
_LOWEST = (-0.5, -0.3, -0.5, 0.7)
_HIGHEST = (0.9, 0.7, 0.5, 1.9)
_SHORTEST, _LONGEST = 0.4, 0.8


def _rotation(axis: int, angle: jax.Array) -> jax.Array:
    """About a coordinate axis, [3, 3]: 1 + sin K + (1 - cos) K^2, with K v = axis x v (Rodrigues)."""
    turn = np.zeros((3, 3))
    turn[(axis + 2) % 3, (axis + 1) % 3] = 1
    turn[(axis + 1) % 3, (axis + 2) % 3] = -1
    return jnp.eye(3) + jnp.sin(angle) * turn + (1 - jnp.cos(angle)) * (turn @ turn)


def _links(q: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Centers [2, 3] and orientations [2, 3, 3] of the links; a link's own axis is -z."""
    upper = _rotation(1, q[0]) @ _rotation(0, q[1]) @ _rotation(2, q[2])
    fore = upper @ _rotation(1, -q[3])
    down = jnp.array([0.0, 0.0, -1.0])
    elbow = _LENGTHS[0] * upper @ down
    centers = jnp.stack([0.5 * elbow, elbow + 0.5 * _LENGTHS[1] * fore @ down])
    return centers, jnp.stack([upper, fore])


def kinetic_energy(q: jax.Array, velocity: jax.Array) -> jax.Array:
    """Of both links in J: positions [J] in radians and velocities [J]; result []."""
    _, (center_velocity, turning) = jax.jvp(_links, (q,), (velocity,))
    masses, radii, lengths = jnp.array(_MASSES), jnp.array(_RADII), jnp.array(_LENGTHS)
    across, along = masses * radii**2 / 4, masses * lengths**2 / 12
    # A cylinder's second moments of mass about its center, along its own axes.
    moments = jnp.stack([across, across, along], axis=1)
    moving = (masses[:, None] * center_velocity**2).sum()
    return 0.5 * (moving + (turning**2 * moments[:, None]).sum())


def potential_energy(q: jax.Array) -> jax.Array:
    """Of both links in J: positions [J]; result []."""
    return _GRAVITY * (jnp.array(_MASSES) * _links(q)[0][:, 2]).sum()


def torques(q: jax.Array, velocity: jax.Array, acceleration: jax.Array) -> jax.Array:
    """Inverse dynamics, d/dt dL/dq' - dL/dq with L the kinetic less the potential energy: [J]."""

    def momentum(q: jax.Array, velocity: jax.Array) -> jax.Array:
        return jax.grad(kinetic_energy, argnums=1)(q, velocity)

    _, change = jax.jvp(momentum, (q, velocity), (velocity, acceleration))
    force = jax.grad(kinetic_energy)(q, velocity) - jax.grad(potential_energy)(q)
    return change - force


def accelerations(q: jax.Array, velocity: jax.Array, torque: jax.Array) -> jax.Array:
    """Forward dynamics, which the rows hold: M(q)^-1 (torque - the torque of no acceleration)."""
    inertia = jax.hessian(kinetic_energy, argnums=1)(q, velocity)
    return jnp.linalg.solve(inertia, torque - torques(q, velocity, jnp.zeros_like(q)))


@functools.partial(jax.jit, static_argnums=1)
def movements(key: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """A random moment of each of B = `count` movements.

    A movement goes from one random posture to another in a random time, and its positions follow
    10 s^3 - 15 s^4 + 6 s^5 where s is the share of the time that has passed.

    Returns:
      [B, 3 J] positions (radians), velocities and torques (N m); [B, J] accelerations.
    """
    start_key, end_key, duration_key, moment_key = jax.random.split(key, 4)
    low, high = jnp.array(_LOWEST), jnp.array(_HIGHEST)
    start = jax.random.uniform(start_key, (count, NUM_JOINTS), minval=low, maxval=high)
    end = jax.random.uniform(end_key, (count, NUM_JOINTS), minval=low, maxval=high)
    time = jax.random.uniform(duration_key, (count, 1), minval=_SHORTEST, maxval=_LONGEST)
    s = jax.random.uniform(moment_key, (count, 1))
    q = start + (end - start) * (10 * s**3 - 15 * s**4 + 6 * s**5)
    velocity = (end - start) * (30 * s**2 - 60 * s**3 + 30 * s**4) / time
    acceleration = (end - start) * (60 * s - 180 * s**2 + 120 * s**3) / time**2
    torque = jax.vmap(torques)(q, velocity, acceleration)
    return jnp.concatenate([q, velocity, torque], axis=1), acceleration


@dataclasses.dataclass
class RobotArm(TableConfig):
    """Simulated rows; all columns have mean 0 and variance 1 over the training split.

    Attributes:
      test_rows: in the split `test`; every row of both splits is of another movement.
      simulation_seed: of the movements; the run's seed orders the rows.
    """

    train_rows: int = field(15_000, at_least=2)
    test_rows: int = field(5_000, at_least=2)
    simulation_seed: int = 0

    @property
    def num_inputs(self) -> int:
        """n: position, velocity and torque of each joint."""
        return 3 * NUM_JOINTS

    @property
    def num_targets(self) -> int:
        """m: the joints' accelerations."""
        return NUM_JOINTS

    @property
    def has_classes(self) -> bool:
        """No: accelerations are any numbers."""
        return False

    def open(self, seed: int) -> TablePipeline:
        """See `DataConfig`."""
        self.validate()
        return TablePipeline("robot_arm", self.tables(), "train", self.batch_size, seed)

    def tables(self) -> dict[str, Table]:
        """Simulates the splits `train` and `test`."""
        total = self.train_rows + self.test_rows
        # The same rows whatever the process computes in and on.
        cpu = jax.local_devices(backend="cpu")[0]
        with jax.enable_x64(True), jax.default_device(cpu):
            simulated = movements(jax.random.key(self.simulation_seed), total)
        inputs, targets = (
            _standardized(np.asarray(columns), self.train_rows) for columns in simulated
        )
        bounds = {"train": slice(self.train_rows), "test": slice(self.train_rows, total)}
        return {
            split: Table(inputs[rows], targets[rows], np.full(len(inputs[rows]), "robot_arm"))
            for split, rows in bounds.items()
        }


def _standardized(columns: np.ndarray, train_rows: int) -> np.ndarray:
    """float32, with mean 0 and variance 1 in every column over the first `train_rows` rows."""
    train = columns[:train_rows]
    return ((columns - train.mean(axis=0)) / train.std(axis=0)).astype(np.float32)
