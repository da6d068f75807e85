"""A dense branch beside the routed experts, which every token visits.

Axis letters: B batch, L length, d width.
"""

import enum

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.layers.feed_forward import FeedForward


class BranchMix(enum.StrEnum):
    """How the dense branch and the routed experts become one output.

    SUM: added (DeepSeekMoE eq. 9; DeepSpeed-MoE section 4.1.1, "residual MoE").
    LEARNED: weighted by a softmax over two logits, linear in the token (DeepSpeed's code, whose
      logits have a bias too and start at random).
    """

    SUM = "sum"
    LEARNED = "learned"


class SharedExperts(nnx.Module):
    """The dense branch and its mix with the routed experts' output.

    Attributes:
      dense: the feed-forward network; n shared experts are one of n times the width.
      mix: [d, 2] float32 logit weights of (routed, dense), 0 at the start: half and half; None
        where the two are added.
    """

    def __init__(
        self,
        width: int,
        mlp_width: int,
        mix: BranchMix,
        dropout_rate: float,
        scale: float,
        key: jax.Array,
    ) -> None:
        self.dense = FeedForward(width, mlp_width, dropout_rate, scale, key)
        learned = mix == BranchMix.LEARNED
        self.mix = nnx.Param(jnp.zeros((width, 2)), axes=("router", "router")) if learned else None

    def __call__(self, x: jax.Array, routed: jax.Array, key: jax.Array | None) -> jax.Array:
        """Adds the branch: x and routed [B, L, d] to [B, L, d]; `key` None switches dropout off."""
        dense = self.dense(x, key)
        if self.mix is None:
            return routed + dense
        logits = jnp.einsum("bld,dn->bln", x.astype(jnp.float32), self.mix[...])
        weights = jax.nn.softmax(logits).astype(x.dtype)
        return weights[..., :1] * routed + weights[..., 1:] * dense
