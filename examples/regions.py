"""Data for the examples: a function that is another linear map in each region of the plane.

Axis letters: B batch, L length, d width.
"""

import jax
import jax.numpy as jnp

REGIONS, WIDTH = 4, 16


def batch(key: jax.Array, rows: int = 8, length: int = 32) -> tuple[jax.Array, jax.Array]:
    """x and y [B, L, d]: y is x times the matrix of the region that x lies in."""
    centers = 2 * jax.random.normal(jax.random.key(0), (REGIONS, WIDTH))
    matrices = jax.random.normal(jax.random.key(1), (REGIONS, WIDTH, WIDTH)) / WIDTH**0.5
    region_key, noise_key = jax.random.split(key)
    region = jax.random.randint(region_key, (rows, length), 0, REGIONS)
    x = centers[region] + jax.random.normal(noise_key, (rows, length, WIDTH))
    return x, jnp.einsum("bld,bldf->blf", x, matrices[region])
