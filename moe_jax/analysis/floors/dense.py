"""The dense floor: all N = T * K assignments through ONE feed-forward network.

The layer's algorithmic FLOPs with the weights of a single expert: what a dense layer that visits as
many rows would cost. Axis letters: R rows, d width, f expert width.
"""

import jax
import jax.numpy as jnp


def apply(rows: jax.Array, w_in: jax.Array, w_out: jax.Array) -> jax.Array:
    """relu(rows W_in) W_out, no biases.

    Args:
      rows: [R, d] in the compute dtype.
      w_in: [d, f], cast to the dtype of `rows`.
      w_out: [f, d], likewise.

    Returns:
      [R, d] in the dtype of `rows`.
    """
    hidden = jax.nn.relu(jnp.matmul(rows, w_in.astype(rows.dtype)))
    return jnp.matmul(hidden, w_out.astype(rows.dtype))


def flops(rows: int, width: int, mlp_width: int) -> int:
    """FLOPs of the forward pass, two per multiply-add; with the backward pass three times as many."""
    return 2 * rows * (width * mlp_width + mlp_width * width)
