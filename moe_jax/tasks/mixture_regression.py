"""Training of mixtures by the gradient of one of their error functions.

Axis letters: B cases, m outputs, D domains.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.data.tables import TableConfig
from moe_jax.errors import UserError
from moe_jax.models.mixtures.mixture import Mixture, MixtureConfig
from moe_jax.models.mixtures.objectives import Objective, errors, squared_errors
from moe_jax.tasks.task import Batch, Metrics, Sums, Task


@dataclasses.dataclass
class MixtureRegression(Task):
    """Mean error over the cases (Jacobs et al. 1991).

    The `loss` that is recorded is always the mean squared error of the blended output, in which
    runs with different objectives can be compared.

    Attributes:
      objective: what is minimized.
      classes: targets are 0 or 1, so that `accuracy` can be counted: the share of cases with every
        output on its target's side of 1/2.
    """

    objective: Objective = Objective.COMPETITIVE
    classes: bool = True

    def validate(self, model: MixtureConfig, data: TableConfig) -> None:
        """See `Task`."""
        for kind, config, wanted in (
            ("model", model, MixtureConfig),
            ("data", data, TableConfig),
        ):
            if not isinstance(config, wanted):
                raise UserError(
                    f"task is MixtureRegression, but {kind} is {type(config).__name__}; use "
                    f"{wanted.__name__}."
                )
        for field, other in (("num_inputs", "num_inputs"), ("num_outputs", "num_targets")):
            if getattr(model, field) != getattr(data, other):
                raise UserError(
                    f"model.{field} is {getattr(model, field)}, but a row of the data has "
                    f"{getattr(data, other)}; make them equal."
                )
        if self.classes and not data.has_classes:
            raise UserError(
                f"task.classes is true, but targets of {type(data).__name__} are not all 0 or 1; set "
                "task.classes=false."
            )
        if model.deviations and self.objective != Objective.COMPETITIVE:
            raise UserError(
                f"task.objective is {self.objective.value}, which has no place for the experts' "
                "deviations; set model.deviations=false."
            )

    def moe_inputs(self, model: MixtureConfig, data: TableConfig) -> list[tuple[str, int, int]]:
        """See `Task`: every expert runs on every case, in no groups."""
        return []

    def training_loss(
        self, model: Mixture, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """See `Task`; nothing is random."""
        output, targets = model(batch["inputs"]), batch["targets"]
        metrics: Metrics = {
            "loss": squared_errors(output.blended, targets).mean(),
            "auxiliary_loss": jnp.zeros(()),
            "router": [],
        }
        if self.classes:
            metrics["accuracy"] = is_right(output.blended, targets).mean()
        return errors(self.objective, output, targets).mean(), metrics

    def num_targets(self, batch: Batch, key: jax.Array) -> jax.Array:
        """See `Task`: cases."""
        return jnp.asarray(len(batch["targets"]), jnp.float32)

    def evaluation_sums(self, model: Mixture, batch: Batch, num_domains: int) -> Sums:
        """See `Task`: squared error and accuracy of the blended output."""
        blended, targets = model(batch["inputs"]).blended, batch["targets"]

        def by_domain(values: jax.Array) -> jax.Array:
            return jax.ops.segment_sum(values * batch["mask"], batch["domain"], num_domains)

        counts = by_domain(jnp.ones(len(targets)))
        sums = {"loss": (by_domain(squared_errors(blended, targets)), counts)}
        if self.classes:
            sums["accuracy"] = (by_domain(is_right(blended, targets)), counts)
        return sums


def is_right(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """[B] float32, 1 where every output is on its target's side of 1/2: two [B, m]."""
    return ((outputs > 0.5) == (targets > 0.5)).all(axis=1).astype(jnp.float32)
