"""Where the tokens of held-out text go: a run's routing, summed up over batches.

Axis letters: B batch, L length, G groups, S tokens per group, E experts.
"""

from typing import Any

import jax
import numpy as np

from moe_jax.data.pipelines import TextPipeline
from moe_jax.layers.mode import Mode
from moe_jax.layers.moe import TokenInfo
from moe_jax.routing import tallies
from moe_jax.routing.assignment import Mean, Routing, TokenAssignment
from moe_jax.routing.tallies import Summary, Tallies
from moe_jax.training.loop import Run
from moe_jax.training.trained import Trained


def routing_statistics(
    trained: Trained,
    data: TextPipeline,
    split: str,
    num_batches: int,
    earlier: Trained | None = None,
) -> dict[int, Summary]:
    """Statistics of each MoE layer on held-out text; see `tallies.summarize` for their names.

    Args:
      trained: the run.
      data: its pipeline.
      split: `validation` or `test`.
      num_batches: how many batches.
      earlier: the run at another step: adds `saturation`, the share of a token's experts that both
        have in common, for token-choice routers.

    Returns:
      Block index -> summary.
    """
    run = trained.run
    step = jax.jit(_tally_step(run, len(data.domains)))
    compare = jax.jit(_compare_step(run))
    totals: dict[int, Tallies] = {}
    common: dict[int, Mean] = {}
    with jax.set_mesh(run.mesh):
        for batch in data.held_out_batches(split, num_batches):
            placed = run.put_batch(batch)
            for layer, tally in step(trained.parameters, trained.variables, placed).items():
                known = totals.get(layer)
                totals[layer] = tally if known is None else tallies.add(known, tally)
            if earlier is None:
                continue
            both = [(one.parameters, one.variables) for one in (earlier, trained)]
            for layer, mean in jax.device_get(compare(*both, placed)).items():
                known_mean = common.get(layer)
                common[layer] = mean if known_mean is None else _sum(known_mean, mean)
    largest_gate = run.config.model.moe.router.largest_gate
    summaries = {layer: tallies.summarize(total, largest_gate) for layer, total in totals.items()}
    for layer, mean in common.items():
        summaries[layer]["saturation"] = float(mean.value())
    return summaries


def _sum(one: Mean, other: Mean) -> Mean:
    return Mean(np.float64(one.total) + other.total, np.float64(one.count) + other.count)


def _routings(
    run: Run, parameters: Any, variables: Any, batch: dict[str, jax.Array]
) -> tuple[dict[int, Routing], TokenInfo, jax.Array]:
    """Each MoE layer's routing, and the tokens and their labels as [G, S]."""
    config = run.config
    tokens = config.task.evaluation_tokens(batch)
    labels = jax.numpy.broadcast_to(batch["domain"][:, None], tokens.shape)
    info = TokenInfo.of(tokens, batch["mask"])
    model = run.definition.merge(parameters, variables)
    _, reports, _ = model(tokens, info.mask, Mode.OBSERVE)
    layers = [
        jax.tree.map(lambda leaf, i=i: leaf[i], report.routing)
        for report in reports
        for i in range(len(report.statistics["load"]))
    ]
    grouped, labels = jax.tree.map(
        lambda leaf: leaf.reshape(-1, config.model.moe.group_size), (info, labels)
    )
    return dict(zip(config.model.moe_layers, layers, strict=True)), grouped, labels


def _tally_step(run: Run, num_domains: int) -> Any:
    model = run.config.model

    def step(parameters: Any, variables: Any, batch: dict[str, jax.Array]) -> dict[int, Tallies]:
        routings, info, labels = _routings(run, parameters, variables, batch)
        tokens = tallies.RoutedTokens(
            info.mask, info.token_ids, info.positions, info.sequence_ids, labels
        )
        return {
            layer: tallies.tally(
                routing,
                tokens,
                num_labels=num_domains,
                length=run.config.data.sequence_length,
                vocab_size=model.vocab_size,
                largest_gate=model.moe.router.largest_gate,
            )
            for layer, routing in routings.items()
        }

    return step


def _compare_step(run: Run) -> Any:
    def step(before: Any, after: Any, batch: dict[str, jax.Array]) -> dict[int, Mean]:
        old, info, _ = _routings(run, before[0], before[1], batch)
        new, _, _ = _routings(run, after[0], after[1], batch)
        return {
            layer: _common(old[layer], new[layer], info.mask)
            for layer in new
            if isinstance(new[layer].assignment, TokenAssignment)
        }

    return step


def _common(old: Routing, new: Routing, mask: jax.Array) -> Mean:
    """Saturation of one token-choice layer."""
    before, after = (
        one.assignment.experts.reshape(mask.size, -1)  # type: ignore[union-attr]
        for one in (old, new)
    )
    num_experts = new.probabilities.shape[-1]
    return tallies.saturation(before, after, mask.reshape(-1), num_experts)
