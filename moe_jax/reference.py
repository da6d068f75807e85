"""What a Mixture-of-Experts layer means, as plain loops over tokens and experts.

The top-k layer of Switch Transformers (Fedus et al. 2021) with K choices per token, and with the router
z-loss of ST-MoE (Zoph et al. 2022). Slow on purpose: no one-hot, no sort of arrays, no scatter, and
nothing shared with the rest of the package, which the tests compare with this. Where tokens go is
decided on concrete numbers, so nothing here can be jitted; what comes out is differentiable.

Axis letters: T tokens, S tokens per group, K choices per token, E experts, C slots per expert,
d width, f expert width.
"""

import collections
import math

import jax
import jax.numpy as jnp
import numpy as np


def top_k(probabilities: np.ndarray, k: int) -> np.ndarray:
    """The experts a token chooses: the K most probable, of equal ones the first (Switch eq. 1).

    Args:
      probabilities: [S, E] float.
      k: K.

    Returns:
      [S, K] int, best first.
    """
    experts = range(probabilities.shape[1])
    return np.array([sorted(experts, key=(-token).__getitem__)[:k] for token in probabilities])


def slots_in_token_order(experts: np.ndarray, mask: np.ndarray, capacity: int) -> np.ndarray:
    """Where choices sit in their experts' buffers when tokens are served left to right.

    An expert that has served C choices of the group serves no more of it (Switch section 2.2).

    Args:
      experts: [S, K] int.
      mask: [S] bool, False for padding, which takes no slot.
      capacity: C.

    Returns:
      [S, K] int in [0, C); C where there is none.
    """
    slots = np.full(experts.shape, capacity)
    taken: collections.Counter[int] = collections.Counter()
    for token, choices in enumerate(experts):
        for choice, expert in enumerate(choices):
            if mask[token] and taken[expert] < capacity:
                slots[token, choice] = taken[expert]
                taken[expert] += 1
    return slots


def expert_sum(
    x: jax.Array,
    experts: np.ndarray,
    served: np.ndarray,
    gates: jax.Array,
    w_in: jax.Array,
    w_out: jax.Array,
) -> jax.Array:
    """Gate-weighted outputs of the experts that served each token (Switch eq. 2).

    An expert is relu(x W_in) W_out.

    Args:
      x: [S, d] float32.
      experts: [S, K] int.
      served: [S, K] bool.
      gates: [S, K] float32.
      w_in: [E, d, f] float32.
      w_out: [E, f, d] float32.

    Returns:
      [S, d] float32; 0 for a token that no expert served.
    """
    # Sliced once, which is much faster.
    vectors, firsts, seconds = list(x), list(w_in), list(w_out)
    rows = []
    for token, choices in enumerate(experts):
        row = jnp.zeros_like(vectors[token])
        for choice, expert in enumerate(choices):
            if served[token, choice]:
                hidden = jnp.maximum(vectors[token] @ firsts[expert], 0)
                row = row + gates[token, choice] * (hidden @ seconds[expert])
        rows.append(row)
    return jnp.stack(rows)


def layer(
    x: jax.Array,
    mask: np.ndarray,
    router: jax.Array,
    w_in: jax.Array,
    w_out: jax.Array,
    *,
    group_size: int,
    choices: int,
    capacity: int,
) -> tuple[jax.Array, dict[str, jax.Array], dict[str, np.ndarray]]:
    """The whole top-k layer on all tokens of a batch, group by group.

    Args:
      x: [T, d] float32.
      mask: [T] bool, False for padding; a group has at least one real token.
      router: [d, E] float32.
      w_in: [E, d, f] float32.
      w_out: [E, f, d] float32.
      group_size: S, a divisor of T; a group is S tokens that follow each other.
      choices: K.
      capacity: C.

    Returns:
      y [T, d] float32.
      The losses [] float32 by name, before coefficients: `load_balancing`, E * sum_e f_e P_e of first
        choices, mean over groups (Switch eq. 4-6); `router_z`, the mean over tokens of
        logsumexp(logits)^2 (ST-MoE eq. 5).
      The statistics by name: `load` [E], choices of each expert for each token, before drops;
        `dropped` [], the fraction of choices without a slot; `entropy` [] of the router's distribution
        in nats, mean over tokens; `logsumexp_squared` [], `router_z`; `max_over_mean_load` [] and
        `load_cv` [], largest load and deviation of loads over their mean.
    """
    tokens, num_experts = x.shape[0], router.shape[1]
    outputs, balance, squares = [], [], []
    load, dropped, entropy = np.zeros(num_experts), 0, 0.0
    for start in range(0, tokens, group_size):
        group, real = x[start : start + group_size], mask[start : start + group_size]
        logits = group @ router
        probabilities = jax.nn.softmax(logits)
        concrete = np.asarray(jax.lax.stop_gradient(probabilities))
        experts = top_k(concrete, choices)
        served = slots_in_token_order(experts, real, capacity) < capacity
        gates = jnp.stack([probabilities[s, experts[s]] for s in range(group_size)])
        outputs.append(expert_sum(group, experts, served, gates, w_in, w_out))

        present = np.flatnonzero(real)
        squares.append(jnp.log(jnp.sum(jnp.exp(logits[present]), axis=1)) ** 2)
        fraction = np.array([np.mean(experts[present, 0] == e) for e in range(num_experts)])
        balance.append(num_experts * jnp.sum(fraction * jnp.mean(probabilities[present], axis=0)))
        for s in present:
            for choice in range(choices):
                load[experts[s, choice]] += 1
                dropped += not served[s, choice]
            entropy -= sum(p * math.log(p) for p in concrete[s])
    count = int(mask.sum())
    losses = {
        "load_balancing": jnp.stack(balance).mean(),
        "router_z": jnp.concatenate(squares).sum() / count,
    }
    statistics = {
        "load": load / count,
        "dropped": np.array(dropped / (count * choices)),
        "entropy": np.array(entropy / count),
        "logsumexp_squared": np.array(jax.lax.stop_gradient(losses["router_z"])),
        "max_over_mean_load": np.array(np.max(load) / load.mean()),
        "load_cv": np.sqrt(((load - load.mean()) ** 2).mean()) / load.mean(),
    }
    return jnp.concatenate(outputs), losses, statistics
