"""The MoE layer as loops over groups and experts, without meshes; only `route` is the package's."""

import jax
import jax.numpy as jnp

from moe_jax.routing.assignment import (
    ExpertAssignment,
    RouterInputs,
    SoftAssignment,
)


def layer(config, parameters, variables, x, info, num_experts):
    """[B, L, d] output, losses by name, statistics by name, and each group's routing."""
    width = x.shape[-1]
    rows = x.reshape(-1, config.group_size, width)
    fields = [
        a.reshape(-1, config.group_size)
        for a in (info.mask, info.token_ids, info.positions, info.sequence_ids)
    ]
    arrays = {**parameters["router"], **variables.get("router_state", {})}
    capacity = config.slots(num_experts, train=True)

    def expert(e, inputs):
        return jnp.maximum(inputs @ parameters["w_in"][e], 0) @ parameters["w_out"][e]

    y, routings = [], []
    for g in range(len(rows)):
        inputs = RouterInputs(
            rows[g], *(f[g] for f in fields), jax.random.key(0), jax.random.key(0), train=True
        )
        routing = config.router.route(arrays, inputs, num_experts, capacity)
        routings.append(routing)
        y.append(_combined(routing.assignment, rows[g], expert, num_experts))
    sums = jax.tree.map(
        lambda *a: sum(a), *[(routing.losses, routing.statistics) for routing in routings]
    )
    losses, statistics = ({name: mean.value() for name, mean in part.items()} for part in sums)
    y = jnp.concatenate(y).reshape(x.shape)
    if config.shared_experts:
        dense = parameters["shared"]["dense"]
        y = y + jnp.maximum(x @ dense["w_in"], 0) @ dense["w_out"]
    return y, losses, statistics, routings


def _combined(assigned, x, expert, num_experts):
    tokens = x.shape[0]
    y = [jnp.zeros_like(x[0])] * tokens
    for e in range(num_experts):
        if isinstance(assigned, SoftAssignment):
            outputs = expert(e, assigned.dispatch[:, e].T @ x)
            y = [y[s] + assigned.combine[s, e] @ outputs for s in range(tokens)]
            continue
        outputs = expert(e, x)
        if isinstance(assigned, ExpertAssignment):
            # One row of weights per expert; an empty slot has token S and falls off the end.
            hits = assigned.tokens[e][:, None] == jnp.arange(tokens)
            weights = jnp.sum(jnp.where(hits, assigned.gates[e][:, None], 0.0), axis=0)
        else:
            served = (assigned.experts == e) & (assigned.slots < assigned.capacity)
            weights = jnp.sum(jnp.where(served, assigned.gates, 0.0), axis=1)
        y = [y[s] + weights[s] * outputs[s] for s in range(tokens)]
    return jnp.stack(y)
