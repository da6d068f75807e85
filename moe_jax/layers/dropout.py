"""Dropout as a function of an explicit key."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key


def dropout(
    x: Float[Array, "*shape"], rate: float, key: Key[Array, ""] | None
) -> Float[Array, "*shape"]:
    """Zeroes entries with probability `rate` and scales the rest by 1 / (1 - rate).

    Outside a shard_map the draw is a function of the key and the global index of the entry, so it
    does not depend on the mesh. `key` None means no dropout.
    """
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)
