"""Moving expert buffers between the devices of the `expert` mesh axis, inside a shard_map.

Axis letters: G groups of this device, E experts, C slots per expert and group, d width.
X is the number of devices along the axis; a device owns experts [i * E/X, (i+1) * E/X).
"""

import jax


def to_expert_owners(buffers: jax.Array, axis: str) -> jax.Array:
    """Sends each expert's slots to the device that owns the expert: one all_to_all.

    Args:
      buffers: [G, E, C, ...] this device's groups, all experts.
      axis: name of the mesh axis.

    Returns:
      [E/X, X * G * C, ...] this device's experts, all groups of the X devices.
    """
    groups, experts, capacity = buffers.shape[:3]
    rows = buffers.swapaxes(0, 1).reshape(experts, groups * capacity, *buffers.shape[3:])
    return jax.lax.all_to_all(rows, axis, split_axis=0, concat_axis=1, tiled=True)


def from_expert_owners(rows: jax.Array, axis: str, groups: int, capacity: int) -> jax.Array:
    """The inverse of `to_expert_owners`: one all_to_all.

    Args:
      rows: [E/X, X * G * C, d].
      axis: name of the mesh axis.
      groups: G.
      capacity: C.

    Returns:
      [G, E, C, d].
    """
    rows = jax.lax.all_to_all(rows, axis, split_axis=1, concat_axis=0, tiled=True)
    return rows.reshape(rows.shape[0], groups, capacity, rows.shape[-1]).swapaxes(0, 1)
