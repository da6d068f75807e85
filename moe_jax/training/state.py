"""What training changes, and how it lies on the mesh."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_jax.models.abstract_model import AbstractModel, arrays_of
from moe_jax.parallel.sharding import parameter_shardings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state of a run after `step` steps; with the config it determines all that follows.

    The same tree also holds shapes or shardings in place of the arrays.

    Attributes:
      step: [] int32, steps done.
      parameters: nested dict of float32 arrays.
      variables: nested dict of what the model keeps beside them (expert biases); often empty.
      optimizer: optax state.
    """

    step: Any
    parameters: Any
    variables: Any
    optimizer: optax.OptState


def initial_state(
    model_config: Any,
    optimizer: optax.GradientTransformation,
    seed: int,
    shardings: TrainState,
) -> TrainState:
    """Draws parameters; the numbers depend on the seed and not on the mesh."""

    # The key is an argument, so that runs of all seeds share the compiled program.
    def create(key_data: jax.Array) -> TrainState:
        key = jax.random.wrap_key_data(key_data)
        model = model_config.build(jax.random.fold_in(key, 0))
        parameters, variables = arrays_of(model)
        return TrainState(
            jnp.zeros((), jnp.int32), parameters, variables, optimizer.init(parameters)
        )

    key_data = np.asarray(jax.random.key_data(jax.random.key(seed)))
    return jax.jit(create, out_shardings=shardings)(key_data)


def state_shapes(
    abstract_model: AbstractModel, optimizer: optax.GradientTransformation
) -> TrainState:
    """ShapeDtypeStructs of the state."""
    return TrainState(
        jax.ShapeDtypeStruct((), jnp.int32),
        abstract_model.shapes,
        abstract_model.variable_shapes,
        jax.eval_shape(optimizer.init, abstract_model.shapes),
    )


def state_shardings(
    abstract_model: AbstractModel,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    fsdp_min_size: int,
) -> TrainState:
    """NamedShardings of the state: moments lie where their parameters do, scalars everywhere."""
    whole = NamedSharding(mesh, PartitionSpec())
    parameters = parameter_shardings(
        abstract_model.shapes, abstract_model.axes, mesh, fsdp_min_size
    )
    moments = optax.tree_utils.tree_map_params(
        optimizer,
        _moment_sharding,
        jax.eval_shape(optimizer.init, abstract_model.shapes),
        abstract_model.shapes,
        parameters,
        transform_non_params=lambda _: whole,
    )
    variables = parameter_shardings(
        abstract_model.variable_shapes, abstract_model.variable_axes, mesh, fsdp_min_size
    )
    return TrainState(whole, parameters, variables, moments)


def _moment_sharding(moment: Any, parameter: Any, sharding: NamedSharding) -> NamedSharding:
    """A factored moment is as its parameter, but has size 1 where it is a mean."""
    spec = [
        axis if kept == size else None
        for kept, size, axis in zip(moment.shape, parameter.shape, sharding.spec, strict=True)
    ]
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def abstract_state(shapes: TrainState, shardings: TrainState) -> TrainState:
    """ShapeDtypeStructs with shardings: what a checkpoint is restored to."""
    return jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        shapes,
        shardings,
    )
