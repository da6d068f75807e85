"""The balanced floor: R rows for each of E experts, as two batched matrix products; no router.

The floor that a MoE layer can reach: it must read E weight sets and write E gradients, which the
dense floor does not. Axis letters: E experts, R rows per expert (N / E), d width, f expert width.
"""

import jax
import jax.numpy as jnp


def apply(rows: jax.Array, w_in: jax.Array, w_out: jax.Array) -> jax.Array:
    """relu(rows W_in) W_out for every expert, no biases.

    Args:
      rows: [E, R, d] in the compute dtype.
      w_in: [E, d, f], cast to the dtype of `rows`.
      w_out: [E, f, d], likewise.

    Returns:
      [E, R, d] in the dtype of `rows`.
    """
    hidden = jax.nn.relu(jnp.einsum("erd,edf->erf", rows, w_in.astype(rows.dtype)))
    return jnp.einsum("erf,efd->erd", hidden, w_out.astype(rows.dtype))


def flops(experts: int, rows: int, width: int, mlp_width: int) -> int:
    """FLOPs of the forward pass, two per multiply-add; with the backward pass three times as many."""
    return experts * 2 * rows * (width * mlp_width + mlp_width * width)
