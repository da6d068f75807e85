"""Where the tokens of held-out data go: a run's routing, summed up over batches.

Axis letters: G groups, S tokens per group, E experts.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from moe_jax.data.interface import Pipeline
from moe_jax.errors import UserError
from moe_jax.routing import study
from moe_jax.routing.router import Mean, Routing, TokenAssignment
from moe_jax.routing.study import Summary, Tallies
from moe_jax.tasks.task import Batch, ObservedLayer
from moe_jax.training.run import Run
from moe_jax.training.trained import Trained

Observed = dict[int | str, ObservedLayer]


def routing_statistics(
    trained: Trained,
    data: Pipeline,
    split: str,
    num_batches: int,
    earlier: Trained | None = None,
) -> dict[int | str, Summary]:
    """Statistics of each MoE layer on held-out data; see `study.summarize` for their names.

    Args:
      trained: the run.
      data: its pipeline.
      split: `validation` or `test`.
      num_batches: how many batches.
      earlier: the run at another step: adds `saturation`, the share of a token's experts that both
        have in common, for token-choice routers.

    Returns:
      Name of a MoE layer -> summary, in the model's order.

    Raises:
      UserError: the task cannot follow tokens, or `earlier` is given and no router lets tokens
        choose.
    """
    run = trained.run
    step = jax.jit(_tally_step(run, len(data.domains)))
    compare = jax.jit(_compare_step(run))
    totals: dict[int | str, Tallies] = {}
    gates: dict[int | str, float] = {}
    common: dict[int | str, Mean] = {}
    with jax.set_mesh(run.mesh):
        for batch in data.held_out_batches(split, num_batches):
            placed = run.put_batch(batch)
            tallied, gates = step(trained.parameters, trained.variables, placed)
            for layer, tally in tallied.items():
                known = totals.get(layer)
                totals[layer] = tally if known is None else study.add(known, tally)
            if earlier is None:
                continue
            both = [(one.parameters, one.variables) for one in (earlier, trained)]
            for layer, mean in jax.device_get(compare(*both, placed)).items():
                known_mean = common.get(layer)
                common[layer] = mean if known_mean is None else _sum(known_mean, mean)
    if earlier is not None and not common:
        raise UserError(
            f"saturation_from is {earlier.step}, but saturation is about the experts that tokens "
            "choose, and in this run's routers they choose none; leave it out."
        )
    summaries = {
        layer: study.summarize(totals[layer], float(gates[layer]))
        for layer in run.config.model.moe_layers
    }
    for layer, mean in common.items():
        summaries[layer]["saturation"] = float(mean.value())
    return summaries


def _sum(one: Mean, other: Mean) -> Mean:
    return Mean(np.float64(one.total) + other.total, np.float64(one.count) + other.count)


def _observe(run: Run, parameters: Any, variables: Any, batch: Batch) -> Observed:
    return run.config.task.observe(run.abstract_model.merge(parameters, variables), batch)


def _tally_step(run: Run, num_domains: int) -> Callable[..., Any]:
    """Makes (parameters, variables, batch) -> tallies and largest gate of each layer."""

    def step(parameters: Any, variables: Any, batch: Batch) -> Any:
        observed = _observe(run, parameters, variables, batch)
        tallied = {
            layer: study.tally(
                seen.routing,
                seen.tokens,
                num_labels=num_domains,
                length=seen.length,
                vocab_size=seen.vocab_size,
                largest_gate=seen.largest_gate,
            )
            for layer, seen in observed.items()
        }
        return tallied, {layer: seen.largest_gate for layer, seen in observed.items()}

    return step


def _compare_step(run: Run) -> Callable[..., dict[int | str, Mean]]:
    def step(before: Any, after: Any, batch: Batch) -> dict[int | str, Mean]:
        old = _observe(run, before[0], before[1], batch)
        new = _observe(run, after[0], after[1], batch)
        return {
            layer: _common(old[layer].routing, seen.routing, seen.tokens.mask)
            for layer, seen in new.items()
            if isinstance(seen.routing.assignment, TokenAssignment)
        }

    return step


def _common(old: Routing, new: Routing, mask: jax.Array) -> Mean:
    """Saturation of one token-choice layer."""
    before, after = (
        one.assignment.experts.reshape(mask.size, -1)  # type: ignore[union-attr]
        for one in (old, new)
    )
    num_experts = new.probabilities.shape[-1]
    return study.saturation(before, after, mask.reshape(-1), num_experts)
