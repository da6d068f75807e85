"""The MoE layer one group at a time, every expert on every token; only `route` is the package's."""

import jax
import jax.numpy as jnp

from moe_jax.routing.router import (
    ExpertAssignment,
    RouterInputs,
    SoftAssignment,
)


def layer(config, parameters, variables, x, info, num_experts):
    """[B, L, d] output, losses by name, statistics by name, and the assignments of all groups."""
    width = x.shape[-1]
    rows = x.reshape(-1, config.group_size, width)
    fields = [
        a.reshape(-1, config.group_size)
        for a in (info.mask, info.token_ids, info.positions, info.sequence_ids)
    ]
    arrays = {**parameters["router"], **variables.get("router_state", {})}
    capacity = config.expert_capacity(num_experts, train=True)

    def experts(inputs):
        """[S, d], or [E, P, d] in Soft MoE, to [E, S or P, d]."""
        return jnp.maximum(inputs @ parameters["w_in"], 0) @ parameters["w_out"]

    def one_group(x, mask, token_ids, positions, sequence_ids):
        key = jax.random.key(0)
        inputs = RouterInputs(x, mask, token_ids, positions, sequence_ids, key, key, train=True)
        routing = config.router.route(arrays, inputs, num_experts, capacity)
        return _combined(routing.assignment, x, experts, num_experts), routing

    y, routing = jax.vmap(one_group)(rows, *fields)
    y = y.reshape(x.shape)
    sums = jax.tree.map(lambda a: a.sum(axis=0), (routing.losses, routing.statistics))
    losses, statistics = ({name: mean.value() for name, mean in part.items()} for part in sums)
    if config.shared_experts:
        dense = parameters["shared"]["dense"]
        y = y + jnp.maximum(x @ dense["w_in"], 0) @ dense["w_out"]
    return y, losses, statistics, routing.assignment


def _combined(assigned, x, experts, num_experts):
    tokens = len(x)
    if isinstance(assigned, SoftAssignment):
        outputs = experts(jnp.einsum("sep,sd->epd", assigned.dispatch, x))
        return jnp.einsum("sep,epd->sd", assigned.combine, outputs)
    if isinstance(assigned, ExpertAssignment):
        # An empty slot has token S, of which one_hot makes zeros.
        weights = jax.nn.one_hot(assigned.tokens, tokens) * assigned.gates[..., None]
        weights = weights.sum(axis=1)  # [E, S]
    else:
        served = assigned.position_in_expert < assigned.capacity
        weights = jax.nn.one_hot(assigned.experts, num_experts) * assigned.gates[..., None]
        weights = (weights * served[..., None]).sum(axis=1).T
    return jnp.einsum("es,esd->sd", weights, experts(x))
