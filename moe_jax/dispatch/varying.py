"""How arrays vary between the devices of a shard_map, which JAX keeps as part of their type."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped


def varying_alike(*arrays: Shaped[Array, "..."]) -> tuple[Shaped[Array, "..."], ...]:
    """The arrays, said to vary over every mesh axis that one of them varies over.

    Custom gradients want it, because the gradient of an array has the array's type: said before
    them, JAX sums the gradient over the axes that are added.
    """
    varying = [jax.typeof(array).manual_axis_type.varying for array in arrays]
    union = frozenset().union(*varying)
    return tuple(
        jax.lax.pcast(array, tuple(union - own), to="varying") if union - own else array
        for array, own in zip(arrays, varying, strict=True)
    )


def varying_zeros(
    shape: tuple[int, ...], dtype: Any, *like: Shaped[Array, "..."]
) -> Shaped[Array, "..."]:
    """Zeros that vary over every mesh axis that one of `like` varies over.

    A loop must start with a carry of the type that its body returns.
    """
    zero, *_ = varying_alike(jnp.zeros((), dtype), *like)
    return jnp.broadcast_to(zero, shape)
