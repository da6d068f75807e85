"""What a Mixture-of-Experts layer means, as plain loops over tokens and experts.

Slow on purpose: no one-hot, no sort, no scatter, nothing shared with the package. Where tokens go
is decided on concrete numbers; what comes out is differentiable.

Axis letters: T tokens, S tokens per group, K choices per token, E experts, C slots per expert,
d width, f expert width.
"""

import collections
import math

import jax
import jax.numpy as jnp
import numpy as np


def top_k(probabilities: np.ndarray, k: int) -> np.ndarray:
    """The k most probable experts of each token [S, E], best first; [S, k] int."""
    rows = [sorted(range(len(p)), key=lambda e, p=p: -p[e])[:k] for p in np.asarray(probabilities)]
    return np.array(rows)


def slots_in_token_order(experts: np.ndarray, mask: np.ndarray, capacity: int) -> np.ndarray:
    """Slot of each choice [S, K] when tokens are served left to right; C where there is none."""
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
    """Gate-weighted outputs of the experts that served each token.

    Args:
      x: [S, d].
      experts: [S, K] int.
      served: [S, K] bool.
      gates: [S, K].
      w_in: [E, d, f].
      w_out: [E, f, d].

    Returns:
      [S, d].
    """
    x, w_in, w_out = list(x), list(w_in), list(w_out)  # Sliced once, which is much faster.
    rows = []
    for token, choices in enumerate(experts):
        row = jnp.zeros_like(x[token])
        for choice, expert in enumerate(choices):
            if served[token, choice]:
                hidden = jnp.maximum(x[token] @ w_in[expert], 0)
                row = row + gates[token, choice] * (hidden @ w_out[expert])
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
    """The whole top-k layer on all tokens of a batch.

    Args:
      x: [T, d].
      mask: [T] bool.
      router: [d, E].
      w_in, w_out: [E, d, f] and [E, f, d].
      group_size, choices, capacity: S, K and C.

    Returns:
      y [T, d], the losses by name, and the statistics by name.
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
        "load_balancing": sum(balance) / len(balance),
        "router_z": sum(jnp.sum(s) for s in squares) / count,
    }
    statistics = {
        "load": load / count,
        "dropped": np.array(dropped / (count * choices)),
        "entropy": np.array(entropy / count),
        "logsumexp_squared": np.array(jax.lax.stop_gradient(losses["router_z"])),
        "max_over_mean_load": load.max() / load.mean(),
        "load_cv": np.sqrt(((load - load.mean()) ** 2).mean()) / load.mean(),
    }
    return jnp.concatenate(outputs), losses, statistics
