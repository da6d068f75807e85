"""Every token's vector times a matrix: what dense layers, attention and the output layer multiply by.

Axis letters: T tokens, any number of leading dimensions.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from moe_jax.parallel.mesh import MODEL, mesh_in_force, platform_in_force
from moe_jax.parallel.sharding import axis_size


def project(
    x: Float[Array, "..."],
    weight: Float[Array, "..."],
    contracted: int = 1,
    dtype: DTypeLike | None = None,
) -> Float[Array, "..."]:
    """Multiplies the last dimensions of `x` with the first of `weight`.

    For CPUs XLA is handed [T, in] and [in, out], because what it is handed it also differentiates: for
    the weights' gradient of a product of [B, L, d] its CPU backend first writes transposed copies of both
    activations (a stack of four SwiGLU networks of width 256, forward and backward on 2,048 tokens and
    2 cores: 813 ms, of [T, d] 561). Elsewhere dimensions are left as they are: merged, they cost a program
    of Mixtral 8x22B for TPUs 0.3 GiB.

    Args:
      x: [..., *in] in the compute dtype.
      weight: [*in, *out], any dtype; it is cast to that of `x`.
      contracted: how many dimensions `in` has.
      dtype: of the result; None for that of `x`.

    Returns:
      [..., *out].
    """
    weight = weight.astype(x.dtype)
    if platform_in_force() != "cpu":
        return jnp.tensordot(x, weight, contracted, preferred_element_type=dtype)
    rows, inputs, outputs = (
        x.shape[: x.ndim - contracted],
        weight.shape[:contracted],
        weight.shape[contracted:],
    )
    x = x.reshape(math.prod(rows), math.prod(inputs))
    # The mesh may split the first of `in`, and so the merged dimension. It may also split one of `out`
    # that is not the first (heads, after queries, keys and values), and then no merged one.
    merged = (math.prod(outputs),) if axis_size(mesh_in_force(), MODEL) == 1 else outputs
    y = jnp.tensordot(
        x, weight.reshape(math.prod(inputs), *merged), 1, preferred_element_type=dtype
    )
    return y.reshape(*rows, *outputs)
