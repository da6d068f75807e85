"""The error function and what is built on it, differentiable inside a `jax.shard_map`.

JAX from 0.11 on differentiates `erf` and `erfc` through a polynomial whose coefficients do not vary
over the mesh while its argument does, and refuses that inside a shard_map ("Primitive polynomial
requires varying manual axes to match"). The derivatives here are in closed form, which every version
takes; the values are JAX's own. Whatever runs inside the MoE layer uses these functions and not
`jax.lax.erf`, `jax.scipy.stats.norm.cdf` or `jax.nn.gelu(approximate=False)`.
"""

import math

import jax
import jax.numpy as jnp

_SLOPE_AT_0 = 2 / math.sqrt(math.pi)


@jax.custom_jvp
def erf(x: jax.Array) -> jax.Array:
    """2 / sqrt(pi) times the integral of exp(-t^2) from 0 to x, elementwise on floats [...]."""
    return jax.lax.erf(x)


@erf.defjvp
def _erf_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = primals, tangents
    return erf(x), _SLOPE_AT_0 * (dx * jnp.exp(-jnp.square(x)))


@jax.custom_jvp
def erfc(x: jax.Array) -> jax.Array:
    """1 - erf(x) without cancellation for large x, elementwise on floats [...]."""
    return jax.lax.erfc(x)


@erfc.defjvp
def _erfc_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = primals, tangents
    return erfc(x), -_SLOPE_AT_0 * (dx * jnp.exp(-jnp.square(x)))


def normal_cdf(x: jax.Array) -> jax.Array:
    """Phi(x), the chance that a standard normal number is below x, elementwise on floats [...].

    By erf near 0 and by erfc in the tails, where 1 + erf would cancel.
    """
    scaled = x * jnp.sqrt(jnp.asarray(0.5, x.dtype))
    upper = erfc(jnp.abs(scaled))
    tails = jnp.where(scaled > 0, 2 - upper, upper)
    return 0.5 * jnp.where(jnp.abs(scaled) < math.sqrt(0.5), 1 + erf(scaled), tails)


def gelu(x: jax.Array) -> jax.Array:
    """x Phi(x), the exact GELU (Hendrycks & Gimpel 2016), elementwise on floats [...]."""
    return 0.5 * x * erfc(-x * jnp.sqrt(jnp.asarray(0.5, x.dtype)))
