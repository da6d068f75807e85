"""The dense feed-forward layer.

Axis letters: B batch, L length, d width, f feed-forward width.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.layers.dropout import dropout
from moe_jax.layers.initializers import scaled_truncated_normal
from moe_jax.parallel.sharding import constrain


class FeedForward(nnx.Module):
    """relu(x W_in) W_out, no biases (T5).

    Attributes:
      w_in: [d, f] float32.
      w_out: [f, d] float32.
    """

    def __init__(
        self, width: int, mlp_width: int, dropout_rate: float, scale: float, key: jax.Array
    ) -> None:
        in_key, out_key = jax.random.split(key)
        w_in = scaled_truncated_normal(in_key, (width, mlp_width), width, scale)
        w_out = scaled_truncated_normal(out_key, (mlp_width, width), mlp_width, scale)
        self.w_in = nnx.Param(w_in, axes=("embed", "mlp"))
        self.w_out = nnx.Param(w_out, axes=("mlp", "embed"))
        self.dropout_rate = dropout_rate

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """[B, L, d] to [B, L, d]; `key` None switches dropout off."""
        hidden = jax.nn.relu(jnp.einsum("bld,df->blf", x, self.w_in[...].astype(x.dtype)))
        hidden = constrain(hidden, "batch", "length", "mlp")
        hidden = dropout(hidden, self.dropout_rate, key)
        return jnp.einsum("blf,fd->bld", hidden, self.w_out[...].astype(x.dtype))
