"""A config built for a mesh: the model, its jitted step, and arrays placed where they belong."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_jax.errors import UserError
from moe_jax.models.abstract_model import AbstractModel
from moe_jax.parallel import multihost
from moe_jax.parallel.mesh import AXES, TOKEN_AXES, force_host_devices, make_mesh
from moe_jax.tasks.task import Batch
from moe_jax.training import experiment
from moe_jax.training.checkpoints import Checkpoints
from moe_jax.training.experiment import Experiment
from moe_jax.training.hyperparameters import Hyperparameters
from moe_jax.training.memory import check_state_fits
from moe_jax.training.state import (
    TrainState,
    abstract_state,
    initial_state,
    state_shapes,
    state_shardings,
)
from moe_jax.training.step import all_finite, train_step


@dataclasses.dataclass(frozen=True)
class Run:
    """A built run: mesh, model and optimizer, before any step.

    Attributes:
      config: the validated config.
      mesh: the device mesh.
      abstract_model: the model without arrays.
      optimizer: optax transformation.
      shapes, shardings: of the TrainState.
    """

    config: Experiment
    mesh: Mesh
    abstract_model: AbstractModel
    optimizer: Any
    shapes: TrainState
    shardings: TrainState

    @classmethod
    def build(cls, config: Experiment) -> "Run":
        """Validates the config and makes the mesh and the model's abstract_model.

        Raises:
          UserError: the config cannot work on these devices.
        """
        config.validate()
        experiment.check_can_be_rebuilt(config)
        force_host_devices(config.mesh.devices_of_process)
        mesh = make_mesh(config.mesh)
        multihost.check_mesh(mesh)
        multihost.only_first_informs()
        return cls.on(config, mesh)

    @classmethod
    def on(cls, config: Experiment, mesh: Mesh) -> "Run":
        """Makes the abstract_model of a validated config for a mesh, whose devices need not be here.

        Raises:
          UserError: the mesh does not divide a parameter.
        """
        abstract_model = AbstractModel.of(config.model)
        optimizer = config.optimizer.build(config.steps, abstract_model.axes)
        shapes = state_shapes(abstract_model, optimizer)
        shardings = state_shardings(abstract_model, optimizer, mesh, config.mesh.fsdp_min_size)
        return cls(config, mesh, abstract_model, optimizer, shapes, shardings)

    @property
    def replicated(self) -> NamedSharding:
        """The whole array on every device: only then can each process read it."""
        return NamedSharding(self.mesh, PartitionSpec())

    def initial_state(self) -> TrainState:
        """Step 0.

        Raises:
          UserError: it needs more memory than there is.
        """
        check_state_fits(abstract_state(self.shapes, self.shardings))
        return initial_state(self.config.model, self.optimizer, self.config.seed, self.shardings)

    @functools.cached_property
    def train_step(self) -> Any:
        """The jitted step (state, batch, signals, hyperparameters) -> (state, metrics).

        It takes over the state. `signals` are those of `broadcast_signal`, the last argument is
        `hyperparameters`; metrics are whole on every device.
        """
        config, abstract_model = self.config, self.abstract_model

        def step(
            state: TrainState, batch: Batch, signals: jax.Array, given: Hyperparameters
        ) -> tuple[TrainState, Any]:
            optimizer = dataclasses.replace(config.optimizer, **given.optimizer)
            one_step = train_step(
                abstract_model.with_factors(given.routers),
                config.task,
                optimizer.build(config.steps, abstract_model.axes),
                config.skip_nonfinite,
                config.microbatches,
                self.are_finite,
            )
            noise_key = jax.random.wrap_key_data(given.noise_key_data)
            state, step_metrics = one_step(state, batch, noise_key)
            return state, {**step_metrics, "signal": signals.max()}

        return jax.jit(step, donate_argnums=0, out_shardings=(self.shardings, self.replicated))

    def are_finite(self, tree: Any) -> jax.Array:
        """[] bool: whether parameters and variables are finite.

        Each device looks at what it has, and tells the others once; of each array alone it would tell
        them as often as there are arrays (7 % of a small model's step on 8 host devices).
        """
        specs = jax.tree.map(
            lambda sharding: sharding.spec, (self.shardings.parameters, self.shardings.variables)
        )

        def own(tree: Any) -> jax.Array:
            return all_finite(tree).reshape((1,) * len(AXES))

        of_each = jax.shard_map(
            own, mesh=self.mesh, in_specs=(specs,), out_specs=PartitionSpec(*AXES), check_vma=False
        )
        return of_each(tree).all()

    @functools.cached_property
    def hyperparameters(self) -> Hyperparameters:
        """The config's, whole on every device."""

        def everywhere(value: Any) -> jax.Array:
            array = np.asarray(value)
            return jax.make_array_from_callback(array.shape, self.replicated, lambda _: array)

        return jax.tree.map(everywhere, Hyperparameters.of(self.config, self.abstract_model))

    def abstract_arguments(
        self,
    ) -> tuple[TrainState, dict[str, Any], jax.ShapeDtypeStruct, Hyperparameters]:
        """What `train_step` is called with: shapes and shardings in place of arrays."""
        rows = NamedSharding(self.mesh, PartitionSpec(TOKEN_AXES))
        batch = {
            name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=rows)
            for name, array in self.config.data.batch_shapes.items()
        }
        signals = jax.ShapeDtypeStruct(
            (self.mesh.size,), np.int32, sharding=NamedSharding(self.mesh, PartitionSpec(AXES))
        )
        hyperparameters = jax.tree.map(
            lambda one: jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=self.replicated),
            jax.eval_shape(lambda: Hyperparameters.of(self.config, self.abstract_model)),
        )
        return abstract_state(self.shapes, self.shardings), batch, signals, hyperparameters

    def restore(self, checkpoints: Checkpoints, step: int) -> TrainState:
        """The state of a checkpoint, laid out for this run's mesh.

        Raises:
          UserError: it cannot be read, or is of another step; manifests of version 0.1 do not say of which.
        """
        state = checkpoints.restore(step, abstract_state(self.shapes, self.shardings))
        if int(state.step) != step:
            raise UserError(
                f"checkpoint step {step} holds the state after step {int(state.step)}; give its folder "
                "that name again."
            )
        return state

    def put(self, rows: Callable[[int, int], dict[str, np.ndarray]], count: int) -> dict[str, Any]:
        """Makes global arrays of `count` rows; each process reads only its devices' rows.

        Args:
          rows: (start, stop) -> these rows of the global batch.
          count: rows of the global batch.
        """
        sharding = NamedSharding(self.mesh, PartitionSpec(TOKEN_AXES))
        read = functools.cache(rows)  # Devices along `model` ask for the same rows.

        def global_array(name: str, example: np.ndarray) -> jax.Array:
            def shard(index: Any) -> np.ndarray:
                start, stop, _ = index[0].indices(count)
                return read(start, stop)[name]

            return jax.make_array_from_callback((count, *example.shape[1:]), sharding, shard)

        return {name: global_array(name, example) for name, example in rows(0, 1).items()}

    def put_batch(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """Makes global arrays of a batch that every process has whole."""

        def rows(start: int, stop: int) -> dict[str, np.ndarray]:
            return {name: values[start:stop] for name, values in batch.items()}

        return self.put(rows, self.config.data.batch_size)


def broadcast_signal(mesh: Mesh, number: int) -> jax.Array:
    """[devices] int32: the signal that the process of each device has received, 0 for none.

    A step returns the largest, so that all processes learn of it from the same step, at the cost of
    one all-reduce of an integer and no waiting.

    Args:
      mesh: of the run.
      number: for the devices of this process; other processes give theirs.
    """
    sharding = NamedSharding(mesh, PartitionSpec(AXES))
    return jax.make_array_from_callback(
        (mesh.size,), sharding, lambda _: np.array([number], np.int32)
    )
