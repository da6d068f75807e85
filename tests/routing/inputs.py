"""Groups of tokens for the routers' tests."""

import jax
import jax.numpy as jnp

from moe_jax.routing.router import RouterInputs


def group(x, *, mask=None, token_ids=None, sequence_ids=None, seed=0, train=True):
    """RouterInputs of one group of `len(x)` tokens; everything but x has a default."""
    x = jnp.asarray(x)
    count = len(x)
    position = jnp.arange(count, dtype=jnp.int32)
    return RouterInputs(
        x=x,
        mask=jnp.ones(count, bool) if mask is None else jnp.asarray(mask),
        token_ids=position if token_ids is None else jnp.asarray(token_ids, jnp.int32),
        positions=position,
        sequence_ids=jnp.zeros(count, jnp.int32)
        if sequence_ids is None
        else jnp.asarray(sequence_ids, jnp.int32),
        key=jax.random.key(seed),
        shared_key=jax.random.key(seed + 1000),
        train=train,
    )


def vectors(count, width=8, seed=0):
    """[count, width] float32 normal."""
    return jax.random.normal(jax.random.key(seed), (count, width))
