"""Auxiliary losses of one group, by the names of the papers; coefficients are the router's.

Axis letters: S tokens in a group, K choices per token, E experts.
"""

import jax
import jax.numpy as jnp

from moe_jax.routing.assignment import Mean


def load_balancing(probabilities: jax.Array, experts: jax.Array, mask: jax.Array) -> Mean:
    """E * sum_e f_e P_e (Switch eq. 4-6, coefficient 1e-2); 1 at perfect balance.

    f_e is the fraction of tokens whose FIRST choice is e, counted before any drop and without
    gradient; P_e is the mean router probability of e. (GShard's l_aux is this over E^2.)

    Args:
      probabilities: [S, E] float32 softmax of the router logits.
      experts: [S, K] int32 chosen experts, first choice first.
      mask: [S] bool, False for padding.

    Returns:
      The group's loss with count 1, or 0 with count 0 for a group of padding: groups weigh alike.
    """
    num_experts = probabilities.shape[-1]
    first = jax.nn.one_hot(experts[:, 0], num_experts)
    fraction = Mean.of(first, mask).value()
    importance = Mean.of(probabilities, mask).value()
    loss = num_experts * jnp.sum(jax.lax.stop_gradient(fraction) * importance)
    return Mean(loss, mask.any().astype(jnp.float32))


def router_z(logits: jax.Array, mask: jax.Array) -> Mean:
    """Mean over tokens of logsumexp(logits)^2 (ST-MoE eq. 5, coefficient 1e-3).

    (ln E)^2 where all logits are 0.

    Args:
      logits: [S, E] float32.
      mask: [S] bool, False for padding.
    """
    return Mean.of(jax.nn.logsumexp(logits, axis=-1) ** 2, mask)
