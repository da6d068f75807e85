"""In which order experts serve tokens when their buffers are too small for all.

Axis letters: S tokens in a group, K choices per token, N = S * K assignments, E experts, C slots
per expert.
"""

import enum

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key


class Priority(enum.StrEnum):
    """Who gets a slot first.

    TOKEN: left to right by token, each with all its choices. The only one that is causal for K > 1.
    CHOICE: all first choices left to right, then all second choices (GShard, V-MoE, flaxformer).
    BATCH_PRIORITY: as CHOICE, but tokens in descending order of their largest gate (V-MoE BPR).
    ASSIGNMENT_PRIORITY: single (token, expert) pairs in descending order of their gates.
    RANDOM: pairs in random order in training (DeepSpeed's random token selection); evaluation
      draws nothing and serves left to right by token.
    """

    TOKEN = "token"
    CHOICE = "choice"
    BATCH_PRIORITY = "batch_priority"
    ASSIGNMENT_PRIORITY = "assignment_priority"
    RANDOM = "random"


# Why an order is not causal where K > 1 (and, but for CHOICE, where K = 1).
LEAKS = {
    Priority.CHOICE: "a token's second choice is served after the first choices of later tokens",
    Priority.BATCH_PRIORITY: "later tokens with larger gates are served before a token",
    Priority.ASSIGNMENT_PRIORITY: "later tokens with larger gates are served before a token",
    Priority.RANDOM: "later tokens that were drawn first are served before a token",
}


def leak_of(order: Priority, choices: int) -> str | None:
    """What `Router.leak` says of a priority order for K choices."""
    if order == Priority.CHOICE and choices == 1:
        return None
    return LEAKS.get(order)


def permutation(
    order: Priority, gates: Float[Array, "S K"], key: Key[Array, ""], train: bool
) -> Int[Array, " S*K"] | None:
    """The order in which assignments are served.

    Args:
      order: the rule.
      gates: [S, K] float32.
      key: of the group; read by RANDOM only.
      train: RANDOM is random only then.

    Returns:
      [N] int32 indices into the flattened [S, K] assignments, or None where that is their order.
    """
    tokens, choices = gates.shape
    match order:
        case Priority.CHOICE:
            return jnp.arange(tokens * choices).reshape(tokens, choices).T.reshape(-1)
        case Priority.BATCH_PRIORITY:
            token = jnp.argsort(-gates.max(axis=1), stable=True)
            return (token * choices + jnp.arange(choices)[:, None]).reshape(-1)
        case Priority.ASSIGNMENT_PRIORITY:
            return jnp.argsort(-gates.reshape(-1), stable=True)
        case Priority.RANDOM if train:
            return jax.random.permutation(key, tokens * choices)
    return None


def position_in_expert(
    experts: Int[Array, "S K"],
    mask: Bool[Array, " S"],
    num_experts: int,
    capacity: int,
    priority_order: Int[Array, " S*K"] | None = None,
    taken: Int[Array, " {num_experts}"] | None = None,
) -> Int[Array, "S K"]:
    """Gives each assignment the next free slot of its expert.

    Args:
      experts: [S, K] int32; E for no choice.
      mask: [S] bool; padding takes no slot.
      num_experts: E.
      capacity: C.
      priority_order: [N] priority order from `permutation`; None for left to right by token.
      taken: [E] int32 slots that are taken already; None for none.

    Returns:
      [S, K] int32 slots in [0, C); C for assignments that found the buffer full, for padding and
      where no choice was made.
    """
    flat = jnp.where(mask[:, None], experts, num_experts).reshape(-1)
    if priority_order is not None:
        flat = flat[priority_order]
    chosen = jax.nn.one_hot(flat, num_experts, dtype=jnp.int32)
    before = jnp.cumsum(chosen, axis=0) - chosen
    if taken is not None:
        before = before + taken
    position = (before * chosen).sum(axis=1)
    slot = jnp.where(flat < num_experts, jnp.minimum(position, capacity), capacity)
    if priority_order is not None:
        slot = jnp.zeros_like(slot).at[priority_order].set(slot, unique_indices=True)
    return slot.reshape(experts.shape)


def filled(
    experts: Int[Array, "S K"], slots: Int[Array, "S K"], num_experts: int, capacity: int
) -> Int[Array, " {num_experts}"]:
    """[E] int32, how many slots of each expert's buffer are taken."""
    held = jax.nn.one_hot(experts, num_experts, dtype=jnp.int32) * (slots < capacity)[..., None]
    return held.sum(axis=(0, 1))
