"""What the trainer asks of a task.

Axis letters: B batch, L length, D domains, G groups, S tokens per group.
"""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.component import Component
from moe_jax.errors import UserError
from moe_jax.layers.moe import MoEConfig, MoEReport, TokenInfo
from moe_jax.routing.router import Routing
from moe_jax.routing.study import RoutedTokens

Batch = Mapping[str, jax.Array]
Metrics = dict[str, Any]
Sums = dict[str, tuple[jax.Array, jax.Array]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ObservedLayer:
    """Where one MoE layer sent the tokens of a batch.

    Attributes:
      routing: of every group, with a leading axis G.
      tokens: the same tokens, [G, S].
      length: positions there can be.
      vocab_size: token ids there can be; 0 where tokens have none (patches).
      largest_gate: of the layer's router.
    """

    routing: Routing
    tokens: RoutedTokens
    length: int = dataclasses.field(metadata={"static": True})
    vocab_size: int = dataclasses.field(metadata={"static": True})
    largest_gate: float = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass
class Task(Component, abc.ABC):
    """A loss for training and sums for evaluation; a component of a config."""

    @abc.abstractmethod
    def validate(self, model: Any, data: Any) -> None:
        """Checks the fields, and that model and data are what the task needs and fit together.

        Args:
          model: config of the model.
          data: config of the data.

        Raises:
          UserError: one sentence that names the field, its value and what would be right.
        """

    @abc.abstractmethod
    def moe_inputs(self, model: Any, data: Any) -> list[tuple[str, int, int]]:
        """What the model's MoE layers cut into groups, so that the trainer can check the sizes.

        Returns:
          (config field of the group size, tokens of one row that meet these layers, group size);
          empty for a dense model.
        """

    @abc.abstractmethod
    def training_loss(self, model: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        """The loss to minimise.

        Args:
          model: the model.
          batch: of the pipeline's `rows`, each array with a leading axis B.
          key: PRNG key of the step.

        Returns:
          [] float32 loss, and metrics: [] scalars `loss` (without the routers' losses),
          `auxiliary_loss` and what else the task measures, and `router` (the MoE layers' reports,
          in the order of the model's `moe_layers`, each with a leading axis over its layers).
        """

    def num_targets(self, batch: Batch, key: jax.Array) -> jax.Array:
        """How many things the loss of these rows is a mean over: tokens to predict, images.

        A batch may be computed in microbatches only if its loss is separable over rows: a mean over
        targets, each of which belongs to one row. A task says that it is by defining this method in the
        class that defines `training_loss`; one that does not (because it compares rows with each other,
        say) is refused with microbatches > 1. So is a subclass with a `training_loss` of its own,
        until it defines this method too.

        What a task promises by it: `training_loss` returns such a mean plus `auxiliary_loss` of its
        reports; its metrics other than `router` are means over the same targets; and all of this is
        0, not NaN, where there are no targets.

        Args:
          batch, key: as in `training_loss`.

        Returns:
          [] float32, at least 0: the sum of weights, if the loss is a weighted mean.
        """
        raise UserError(
            f"task is {type(self).__name__}, which does not say what its loss is a mean over; define "
            "num_targets in it."
        )

    @property
    def separable(self) -> bool:
        """Whether a batch may be computed in microbatches, see `num_targets`."""
        for cls in type(self).__mro__:
            if "num_targets" in vars(cls):
                return cls is not Task
            if "training_loss" in vars(cls):
                return False
        return False

    def validate_microbatches(self, microbatches: int) -> None:
        """Raises UserError where a batch cannot be computed in this many parts."""
        if microbatches > 1 and not self.separable:
            raise UserError(
                f"microbatches is {microbatches}, but the task {type(self).__name__} does not say that "
                "its loss is a mean over targets of single rows; use microbatches=1, or define "
                "num_targets beside its training_loss."
            )

    @abc.abstractmethod
    def evaluation_sums(self, model: Any, batch: Batch, num_domains: int) -> Sums:
        """What evaluation measures, as sums by domain, so that batches can be added up exactly.

        Args:
          model: the model.
          batch: of the pipeline's `held_out_batches`: `mask` [B] is False for filling rows.
          num_domains: D.

        Returns:
          Name -> ([D] sum, [D] number of things summed), float32; `loss` always.
        """

    def observe(self, model: Any, batch: Batch) -> dict[int | str, ObservedLayer]:
        """Runs the model on a held-out batch in Mode.OBSERVE.

        Returns:
          Name of a MoE layer, as in the model's `moe_layers` -> what it did.

        Raises:
          UserError: the task has no tokens whose way could be followed.
        """
        raise UserError(
            f"task is {type(self).__name__}, which does not follow tokens through the routers; "
            "leave --routing out."
        )


def observed_layers(
    names: Sequence[int | str],
    reports: Sequence[MoEReport],
    info: TokenInfo,
    domain: jax.Array,
    settings: Sequence[MoEConfig],
    vocab_size: int,
) -> dict[int | str, ObservedLayer]:
    """What layers that saw the same tokens report of them, for `Task.observe`.

    Args:
      names: of the layers, in the order of the reports.
      reports: of a call in Mode.OBSERVE, each with a leading axis over its layers.
      info: of the tokens, [B, L].
      domain: [B] int32, the tokens' labels.
      settings: that these layers have, with equal groups.
      vocab_size: token ids there can be.
    """
    labels = jnp.broadcast_to(domain[:, None], info.mask.shape)
    tokens = RoutedTokens(info.mask, info.token_ids, info.positions, info.sequence_ids, labels)
    length = info.mask.shape[1]
    group_size = settings[0].for_rows(length).group_size if settings else length
    grouped = jax.tree.map(lambda leaf: leaf.reshape(-1, group_size), tokens)
    routings = [
        jax.tree.map(lambda leaf, i=i: leaf[i], report.routing)
        for report in reports
        for i in range(len(report.statistics["load"]))
    ]
    largest_gate = max((moe.router.largest_gate for moe in settings), default=1.0)
    return {
        name: ObservedLayer(routing, grouped, length, vocab_size, largest_gate)
        for name, routing in zip(names, routings, strict=True)
    }
