"""Soft dispatch: what goes into slots, and what comes out, are weighted means (Soft MoE).

Axis letters: S tokens per group, E experts, P slots per expert, d width. One group.

The two products take 4 * S * E * P * d operations, in float32 at full precision also on TPUs.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.routing.router import SoftAssignment


def fill(x: Float[Array, "S d"], assignment: SoftAssignment) -> Float[Array, "E P d"]:
    """Each slot's mixture of tokens: [S, d] to [E, P, d] in x's dtype, summed in float32.

    x is the layer's input as it is, not the unit vectors that the router compares.
    """
    return _product("sep,sd->epd", assignment.dispatch, x)


def combine(buffers: Float[Array, "E P d"], assignment: SoftAssignment) -> Float[Array, "S d"]:
    """Each token's mixture of slots: [E, P, d] to [S, d] in the same dtype, summed in float32."""
    return _product("sep,epd->sd", assignment.combine, buffers)


def slot_index(token_index: Int[Array, " S"], assignment: SoftAssignment) -> Int[Array, "E P"]:
    """[E, P] int32 that stands for a token index where no one token sits in a slot.

    The index of the group's first token plus p: as long as P <= S, no two slots of an expert share
    one, in all groups.
    """
    _, experts, slots = assignment.dispatch.shape
    return jnp.broadcast_to(token_index[0] + jnp.arange(slots, dtype=jnp.int32), (experts, slots))


def _product(axes: str, weights: jax.Array, values: jax.Array) -> jax.Array:
    wide = values.astype(jnp.float32)
    return jnp.einsum(axes, weights, wide, precision=jax.lax.Precision.HIGHEST).astype(values.dtype)
