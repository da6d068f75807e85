"""One step of training, and one batch of evaluation: pure functions of arrays."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from moe_jax.models.definition import ModelDefinition, numbers_of
from moe_jax.tasks.task import Batch, Sums
from moe_jax.training.microbatches import mean_gradients, moved_variables
from moe_jax.training.state import TrainState

TrainStep = Callable[[TrainState, Batch, jax.Array], tuple[TrainState, dict[str, Any]]]


def train_step(
    definition: ModelDefinition,
    task: Any,
    optimizer: optax.GradientTransformation,
    skip_nonfinite: bool,
    microbatches: int = 1,
) -> TrainStep:
    """Makes the step (state, batch, noise key) -> (state, metrics); jit it with donated state.

    The noise key, of dropout and router noise, is folded with the step, so that a resumed run draws the
    same. It is an argument, so that runs of all seeds share the compiled program.

    Args:
      definition: the model.
      task: gives `training_loss(model, batch, key)`.
      optimizer: optax transformation.
      skip_nonfinite: keep the old parameters where the loss or a gradient is not finite.
      microbatches: parts in which the batch's gradients are computed; 1 for the batch as a whole.
    """

    def step(
        state: TrainState, batch: Batch, noise_key: jax.Array
    ) -> tuple[TrainState, dict[str, Any]]:
        key = jax.random.fold_in(noise_key, state.step)

        def gradients_of(
            parameters: Any, rows: Batch, key: jax.Array
        ) -> tuple[Any, dict[str, Any], Any]:
            def loss(parameters: Any) -> tuple[jax.Array, tuple[dict[str, Any], Any]]:
                model = definition.merge(parameters, state.variables)
                with jax.named_scope("loss"):
                    value, metrics = task.training_loss(model, rows, key)
                return value, (metrics, numbers_of(model)[1])

            gradients, (metrics, variables) = jax.grad(loss, has_aux=True)(parameters)
            return gradients, metrics, variables

        if microbatches == 1:
            gradients, metrics, variables = gradients_of(state.parameters, batch, key)
        else:
            gradients, metrics = mean_gradients(
                lambda *arguments: gradients_of(*arguments)[:2],
                state.parameters,
                batch,
                key,
                microbatches,
            )
            variables = state.variables
            if variables:
                variables = moved_variables(
                    definition, state.parameters, variables, metrics["router"]
                )
        with jax.named_scope("optimizer"):
            gradient_norm = optax.tree_utils.tree_norm(gradients)
            finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(gradient_norm)
            updates, optimizer_state = optimizer.update(
                gradients, state.optimizer, state.parameters
            )
            parameters = optax.apply_updates(state.parameters, updates)
        if skip_nonfinite:
            parameters, variables, optimizer_state = jax.tree.map(
                lambda new, old: jnp.where(finite, new, old),
                (parameters, variables, optimizer_state),
                (state.parameters, state.variables, state.optimizer),
            )
        metrics = {**metrics, "gradient_norm": gradient_norm, "finite": finite}
        return TrainState(state.step + 1, parameters, variables, optimizer_state), metrics

    return step


def noise_key(seed: int) -> jax.Array:
    """Key of all dropout and router noise; another one than the parameters are drawn with."""
    return jax.random.fold_in(jax.random.key(seed), 1)


def evaluation_step(
    definition: ModelDefinition, task: Any, num_domains: int
) -> Callable[[Any, Any, Batch], Sums]:
    """Makes (parameters, variables, batch) -> name of a metric -> ([D] sum, [D] count)."""

    def step(parameters: Any, variables: Any, batch: Batch) -> Sums:
        return task.evaluation_sums(definition.merge(parameters, variables), batch, num_domains)

    return step
