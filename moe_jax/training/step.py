"""One step of training, and one batch of evaluation: pure functions of arrays."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from moe_jax.models.abstract_model import AbstractModel, Tree, arrays_of
from moe_jax.tasks.task import Batch, Metrics, Sums, Task
from moe_jax.training.microbatches import accumulated_gradients
from moe_jax.training.state import TrainState

TrainStep = Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]]


def train_step(
    abstract_model: AbstractModel,
    task: Task,
    optimizer: optax.GradientTransformation,
    skip_nonfinite: bool,
    microbatches: int = 1,
    are_finite: Callable[[Any], jax.Array] | None = None,
) -> TrainStep:
    """Makes the step (state, batch, noise key) -> (state, metrics); jit it with donated state.

    The noise key, of dropout and router noise, is folded with the step, so that a resumed run draws the
    same. It is an argument, so that runs of all seeds share the compiled program.

    Args:
      abstract_model: the model.
      task: gives the loss.
      optimizer: optax transformation.
      skip_nonfinite: keep the old state where the loss, a gradient or a new parameter is not finite; to
        look at the parameters costs about 1 % of a step, which runs that stop instead need not pay.
      microbatches: parts in which the batch's gradients are computed; 1 for the batch as a whole.
      are_finite: `all_finite`, for a tree of parameters and variables that lie on a mesh.

    Raises:
      UserError: the task's loss cannot be computed in parts.
    """
    task.validate_microbatches(microbatches)

    def step(state: TrainState, batch: Batch, noise_key: jax.Array) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(noise_key, state.step)
        if microbatches == 1:
            gradients, metrics, variables = _gradients(
                abstract_model, task, state.parameters, state.variables, batch, key
            )
        else:
            gradients, metrics, variables = accumulated_gradients(
                abstract_model, task, state.parameters, state.variables, batch, key, microbatches
            )
        with jax.named_scope("optimizer"):
            gradient_norm = optax.tree_utils.tree_norm(gradients)
            updates, optimizer_state = optimizer.update(
                gradients, state.optimizer, state.parameters
            )
            parameters = optax.apply_updates(state.parameters, updates)
            finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(gradient_norm)
        if skip_nonfinite:
            # A finite gradient may still give an update that is not. The moments need no look: they are
            # sums of what is in the norm, which is infinite before they are.
            finite &= (are_finite or all_finite)((parameters, variables))
            parameters, variables, optimizer_state = jax.tree.map(
                lambda new, old: jnp.where(finite, new, old),
                (parameters, variables, optimizer_state),
                (state.parameters, state.variables, state.optimizer),
            )
        metrics = {**metrics, "gradient_norm": gradient_norm, "finite": finite}
        return TrainState(state.step + 1, parameters, variables, optimizer_state), metrics

    return step


def all_finite(tree: Any) -> jax.Array:
    """[] bool: whether no number of a tree is infinite or NaN."""
    leaves = (jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))
    return functools.reduce(jnp.logical_and, leaves, jnp.array(True))


def _gradients(
    abstract_model: AbstractModel,
    task: Task,
    parameters: Tree,
    variables: Tree,
    batch: Batch,
    key: jax.Array,
) -> tuple[Tree, Metrics, Tree]:
    """Gradients and metrics of a batch as a whole, and the variables that its pass leaves."""

    def loss(parameters: Tree) -> tuple[jax.Array, tuple[Metrics, Tree]]:
        model = abstract_model.merge(parameters, variables)
        with jax.named_scope("loss"):
            value, metrics = task.training_loss(model, batch, key)
        return value, (metrics, arrays_of(model)[1])

    gradients, (metrics, variables) = jax.grad(loss, has_aux=True)(parameters)
    return gradients, metrics, variables


def noise_key(seed: int) -> jax.Array:
    """Key of all dropout and router noise; another one than the parameters are drawn with."""
    return jax.random.fold_in(jax.random.key(seed), 1)


def evaluation_step(
    abstract_model: AbstractModel, task: Task, num_domains: int
) -> Callable[[Tree, Tree, Batch], Sums]:
    """Makes (parameters, variables, batch) -> name of a metric -> ([D] sum, [D] count)."""

    def step(parameters: Tree, variables: Tree, batch: Batch) -> Sums:
        return task.evaluation_sums(abstract_model.merge(parameters, variables), batch, num_domains)

    return step
