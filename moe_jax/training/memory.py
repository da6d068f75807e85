"""Whether a run's state fits into the memory of the devices, asked before any of it is made."""

import math
from typing import Any

import jax

from moe_jax.errors import UserError
from moe_jax.parallel.memory import memory_of


def check_state_fits(state: Any) -> None:
    """Refuses a state that needs more memory than there is.

    Activations, gradients and copies come on top, so a state that passes may still be too large.

    Args:
      state: tree of ShapeDtypeStructs with shardings.

    Raises:
      UserError: it cannot fit.
    """
    device = jax.local_devices()[0]
    needed = sum(_bytes_of_device(leaf) for leaf in jax.tree.leaves(state))
    where = f"each {device.device_kind} device"
    if device.platform == "cpu":  # Its devices share the machine's memory.
        needed *= jax.local_device_count()
        where = "this machine"
    available = memory_of(device)
    if available is not None and needed > available:
        raise UserError(
            f"the model's parameters and optimizer take {needed / 1e9:,.1f} GB of {where}, which has "
            f"{available / 1e9:,.1f} GB; make the model smaller, or compile it for a larger machine with "
            "experiments/compile_pod.py."
        )


def _bytes_of_device(leaf: jax.ShapeDtypeStruct) -> int:
    assert leaf.sharding is not None
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
