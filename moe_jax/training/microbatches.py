"""Gradients of a batch computed in parts, one after the other, so that activations take less memory.

Axis letters: B rows of a batch, N microbatches, E experts.

The whole batch's loss is a mean over its targets, plus the routers' losses, each a mean over what its
formula averages: tokens, groups, sequences (see `moe_jax.routing.losses`), of which padding is none.
The sum over microbatches of
    (targets of the microbatch / targets of the batch) * (mean over the microbatch's targets)
  + (count of the microbatch / count of the batch) * (router loss of the microbatch),
the latter for each loss of each MoE layer, is therefore the same number, and has the same gradient.
Metrics weigh as the targets do. Losses, statistics and the router state that follows from them
(expert biases) come from sums and counts over all microbatches.

This equals the whole batch where no group of tokens that are routed together is larger than a row: a
microbatch has every N-th row, so that larger groups would hold other rows, and what is not linear in
tokens within a group (fractions times probabilities, squared variations, capacity) differs with them.
Other than in the whole batch are also
  - dropout, router noise, random experts and masked positions, which are drawn for each microbatch;
  - what overflows a dropless layer's buffers (`buffer_factor`), which serve one microbatch at a time;
  - what a task computes of `MoEReport.losses` by itself: it weighs as the targets do.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from moe_jax.errors import UserError
from moe_jax.layers.moe import LossShare, MoE, MoEReport, MoESums
from moe_jax.models.abstract_model import AbstractModel, Tree, arrays_of, moe_modules
from moe_jax.parallel.mesh import TOKEN_AXES
from moe_jax.routing.router import Mean
from moe_jax.routing.statistics import load_evenness
from moe_jax.tasks.task import Batch, Metrics, Task

# Index of a microbatch, and its rows.
_Part = tuple[jax.Array, Batch]
# Path of a MoE module -> name of a router loss -> an array over the module's layers.
_OfLosses = dict[str, dict[str, jax.Array]]


def accumulated_gradients(
    abstract_model: AbstractModel,
    task: Task,
    parameters: Tree,
    variables: Tree,
    batch: Batch,
    key: jax.Array,
    microbatches: int,
) -> tuple[Tree, Metrics, Tree]:
    """Gradients, metrics and next variables of a batch, computed in N parts.

    Args:
      abstract_model: the model.
      task: one whose loss is `separable`.
      parameters, variables: of the model, before the step.
      batch: arrays [B, ...].
      key: of the step; each microbatch gets another.
      microbatches: N, a divisor of B.

    Raises:
      UserError: the model's MoE modules and their reports do not belong together one by one, or the
        model keeps variables that are no router's.
    """
    parts = (jnp.arange(microbatches), split_rows(batch, microbatches))
    targets, counts = loss_counts(abstract_model, task, parameters, variables, parts, key)
    target_share = targets / jnp.where(targets.sum() > 0, targets.sum(), 1.0)
    # What multiplies a microbatch's whole loss, of which the routers' shares are then cleared. A mean
    # over no targets is 0, so that any factor will do that one can divide by.
    factor = jnp.where(targets > 0, target_share, 1.0)
    loss_shares = jax.tree.map(lambda count: (_shares(count).T / factor).T, counts)

    def add(total: Tree, part: tuple[_Part, jax.Array, _OfLosses]) -> tuple[Tree, Metrics]:
        # Or else XLA gathers all parameters before the loop and holds them whole throughout (FSDP).
        part, inside = jax.lax.optimization_barrier((part, parameters))
        (index, rows), factor, shares = part

        def loss(parameters: Tree) -> tuple[jax.Array, Metrics]:
            model = _accumulating(abstract_model.merge(parameters, variables), shares)
            with jax.named_scope("loss"):
                value, metrics = task.training_loss(model, rows, jax.random.fold_in(key, index))
            return factor * value, metrics

        gradients, metrics = jax.grad(loss, has_aux=True)(inside)
        return jax.tree.map(jnp.add, total, gradients), metrics

    start = jax.tree.map(jnp.zeros_like, parameters)
    gradients, metrics = jax.lax.scan(add, start, (parts, factor, loss_shares))
    reports = [_joined(report, factor) for report in metrics.pop("router")]
    auxiliary = metrics.pop("auxiliary_loss")
    metrics = {name: (value.T * target_share).sum(axis=-1) for name, value in metrics.items()}
    metrics |= {"auxiliary_loss": (auxiliary * factor).sum(), "router": reports}
    return gradients, metrics, _next_variables(abstract_model, parameters, variables, reports)


def split_rows(batch: Batch, microbatches: int) -> Batch:
    """[B, ...] to [N, B / N, ...]: microbatch i has the rows i, N + i, 2 N + i, ...

    So every device keeps the rows it has, and what a microbatch holds does not depend on the mesh.
    """

    def split(rows: jax.Array) -> jax.Array:
        parts = rows.reshape(-1, microbatches, *rows.shape[1:]).swapaxes(0, 1)
        if jax.sharding.get_abstract_mesh().empty:
            return parts
        return jax.lax.with_sharding_constraint(parts, PartitionSpec(None, TOKEN_AXES))

    return {name: split(rows) for name, rows in batch.items()}


def loss_counts(
    abstract_model: AbstractModel,
    task: Task,
    parameters: Tree,
    variables: Tree,
    parts: _Part,
    key: jax.Array,
) -> tuple[jax.Array, _OfLosses]:
    """What the losses of each microbatch are means over: counts of targets, and of router losses.

    The model's pass is there for the latter only: where they follow from masks, as all of the
    library's do, nothing else of it is left to be computed.

    Args:
      parts: the microbatches, with a leading axis N.

    Returns:
      [N] float32; by module and loss, [N, layers] float32, empty where no router has a loss.
    """
    modules = moe_modules(abstract_model.merge(parameters, variables))
    routers_have_losses = any(moe.config.router.loss_coefficients for moe in modules.values())

    def count(part: _Part) -> tuple[jax.Array, _OfLosses]:
        index, rows = part
        inside = jax.random.fold_in(key, index)
        targets = task.num_targets(rows, inside)
        if not routers_have_losses:
            return targets, {}
        model = _accumulating(abstract_model.merge(parameters, variables), {})
        _, metrics = task.training_loss(model, rows, inside)
        check_pairs(modules, metrics["router"])
        return targets, {report.path: report.sums.loss_counts for report in metrics["router"]}

    return jax.lax.map(count, parts)


def check_pairs(modules: Mapping[str, MoE], reports: Sequence[MoEReport]) -> None:
    """Checks that reports are of the modules, one of each, in any order.

    Args:
      modules: all of a model, see `moe_modules`.
      reports: of a pass through it.

    Raises:
      UserError: a module has no report or several, or a report no module.
    """
    paths = [report.path for report in reports]
    for path in paths:
        if path not in modules or paths.count(path) > 1:
            raise UserError(
                f"microbatches is above 1, but the model's pass returns {paths.count(path)} reports of "
                f"{path!r}, where it should return one of each MoE layer {list(modules)}; use "
                "microbatches=1, or return the report of each layer once."
            )
    for path in modules:
        if path not in paths:
            raise UserError(
                f"microbatches is above 1, but the model's pass returns no report of its MoE layer "
                f"{path!r}; use microbatches=1, or return it."
            )


def _shares(counts: jax.Array) -> jax.Array:
    """Each microbatch's share of counts [N, ...]; counts below 1 divide as in `Mean.value`."""
    return jnp.maximum(counts, 1.0) / jnp.maximum(counts.sum(axis=0), 1.0)


def _accumulating(model: nnx.Module, shares: _OfLosses) -> nnx.Module:
    """The model, changed in place: its MoE modules report sums and know their shares of the losses."""
    for path, moe in moe_modules(model).items():
        moe.reports_sums = True
        stacked = moe.stacked_shape
        moe.loss_shares = nnx.data(
            {
                name: LossShare(share.reshape(stacked), axes=())
                for name, share in shares.get(path, {}).items()
            }
        )
    return model


def _joined(report: MoEReport, factor: jax.Array) -> MoEReport:
    """The report of the whole batch.

    Args:
      report: of the microbatches, with a leading axis N.
      factor: [N], of each auxiliary loss.
    """
    sums = jax.tree.map(lambda values: values.sum(axis=0), report.sums)
    # A count has an axis over layers, its total may have another one over experts.
    value_of_layers = jax.vmap(Mean.value)
    statistics = {name: value_of_layers(mean) for name, mean in sums.statistics.items()}
    return dataclasses.replace(
        report,
        losses={name: value_of_layers(mean) for name, mean in sums.losses.items()},
        statistics=statistics | load_evenness(statistics["load"]),
        auxiliary_loss=jax.tree.map(
            lambda losses: (losses.T * factor).sum(axis=-1), report.auxiliary_loss
        ),
        sums=MoESums(),
    )


def _next_variables(
    abstract_model: AbstractModel, parameters: Tree, variables: Tree, reports: list[MoEReport]
) -> Tree:
    """Variables after a step, of routers whose state follows the load of the whole batch."""
    model = abstract_model.merge(parameters, variables)
    modules = moe_modules(model)
    followed = set()
    check_pairs(modules, reports)
    for report in reports:
        path, moe = report.path, modules[report.path]
        stacked = moe.stacked_shape
        states = {
            name: state[...].reshape(-1, *state.shape[len(stacked) :])
            for name, state in moe.router_state.items()
        }
        new = jax.vmap(moe.config.router.next_state)(states, report.statistics) if states else {}
        for name, value in new.items():
            moe.router_state[name][...] = value.reshape(moe.router_state[name].shape)
            followed.add(f"{path}/router_state/{name}")
    for keys, _ in jax.tree_util.tree_leaves_with_path(variables):
        kept = "/".join(str(key.key) for key in keys)
        if kept not in followed:
            raise UserError(
                f"microbatches is above 1, but the model keeps {kept}, which is not a router's state "
                "and would not be renewed; use microbatches=1."
            )
    return arrays_of(model)[1]
