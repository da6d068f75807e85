"""Moving rows between the devices of the `expert` mesh axis, inside a shard_map: the transports.

Axis letters: G groups of this device, E experts, C slots per expert and group, d width, R rows.
X is the number of devices along the axis; a device owns experts [i * E/X, (i+1) * E/X).
Annotations have E_X for E/X, X_n for X * n, and *row for whatever dimensions a row has.
"""

import enum

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped


class Transport(enum.StrEnum):
    """How tokens reach the devices that own their experts.

    ALL_TO_ALL: buffers of a fixed size, one for each device, by `all_to_all`.
    RAGGED: as many rows as there are, by `ragged_all_to_all`; for dropless dispatch.
    RING: every device sees all tokens of the axis (all-gather), works on those for its own experts,
      and the results are summed where they belong (reduce-scatter). Sends X times a device's tokens
      whatever K, so it is the cheaper one where K is not far below X.
    """

    ALL_TO_ALL = "all_to_all"
    RAGGED = "ragged"
    RING = "ring"


class Wire(enum.StrEnum):
    """In which dtype rows travel between devices: the compute dtype, or bfloat16.

    Forward and backward; the sums of the ring are made in it, too.
    """

    COMPUTE = "compute"
    BFLOAT16 = "bfloat16"

    def pack(self, rows: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
        """[...] as it is sent; integers stay as they are."""
        narrow = self == Wire.BFLOAT16 and jnp.issubdtype(rows.dtype, jnp.floating)
        return rows.astype(jnp.bfloat16) if narrow else rows


def to_expert_owners(
    buffers: Shaped[Array, "G E C *row"], axis: str, wire: Wire = Wire.COMPUTE
) -> Shaped[Array, "E_X R *row"]:
    """Sends each expert's slots to the device that owns the expert: one all_to_all.

    Args:
      buffers: [G, E, C, ...] this device's groups, all experts.
      axis: name of the mesh axis.
      wire: dtype of the exchange.

    Returns:
      [E/X, X * G * C, ...] this device's experts, all groups of the X devices.
    """
    groups, experts, capacity = buffers.shape[:3]
    rows = buffers.swapaxes(0, 1).reshape(experts, groups * capacity, *buffers.shape[3:])
    sent = jax.lax.all_to_all(wire.pack(rows), axis, split_axis=0, concat_axis=1, tiled=True)
    return sent.astype(buffers.dtype)


def from_expert_owners(
    rows: Shaped[Array, "E_X R d"], axis: str, groups: int, capacity: int, wire: Wire = Wire.COMPUTE
) -> Shaped[Array, "{groups} E {capacity} d"]:
    """The inverse of `to_expert_owners`: one all_to_all.

    Args:
      rows: [E/X, X * G * C, d].
      axis: name of the mesh axis.
      groups: G.
      capacity: C.
      wire: dtype of the exchange.

    Returns:
      [G, E, C, d].
    """
    sent = jax.lax.all_to_all(wire.pack(rows), axis, split_axis=1, concat_axis=0, tiled=True)
    sent = sent.astype(rows.dtype)
    return sent.reshape(sent.shape[0], groups, capacity, sent.shape[-1]).swapaxes(0, 1)


def gather_tokens(
    values: Shaped[Array, " n *row"], axis: str, wire: Wire = Wire.COMPUTE
) -> Shaped[Array, " X_n *row"]:
    """[n, ...] of this device to [X * n, ...] of all, in the order of devices: one all-gather."""
    return jax.lax.all_gather(wire.pack(values), axis, tiled=True).astype(values.dtype)


def sum_to_owners(
    values: Shaped[Array, " X_n *row"], axis: str, wire: Wire = Wire.COMPUTE
) -> Shaped[Array, " n *row"]:
    """Sums [X * n, ...] over devices and leaves each its own [n, ...]: one reduce-scatter."""
    return jax.lax.psum_scatter(wire.pack(values), axis, tiled=True).astype(values.dtype)
