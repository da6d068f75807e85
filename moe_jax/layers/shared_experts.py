"""A dense branch beside the routed experts, which every token visits.

Axis letters: B batch, L length, d width.
"""

import enum

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from moe_jax.layers.feed_forward import FeedForward, FeedForwardForm
from moe_jax.layers.initializers import Scale


class BranchMix(enum.StrEnum):
    """How the dense branch and the routed experts become one output.

    SUM: added (DeepSeekMoE eq. 9; DeepSpeed-MoE section 4.1.1, "residual MoE").
    LEARNED: weighted by a softmax over two logits, linear in the token (DeepSpeed's code, whose
      logits have a bias too and start at random).
    SIGMOID: the branch is weighted by a sigmoid of one such logit, the routed experts are not (Qwen
      1.5 and 2).
    """

    SUM = "sum"
    LEARNED = "learned"
    SIGMOID = "sigmoid"

    @property
    def logits(self) -> int:
        """Logits that the mix takes of each token."""
        return {BranchMix.SUM: 0, BranchMix.LEARNED: 2, BranchMix.SIGMOID: 1}[self]


class SharedExperts(nnx.Module):
    """The dense branch and its mix with the routed experts' output.

    Attributes:
      dense: the feed-forward network; n shared experts are one of n times the width.
      mix: [d, 2] float32 logit weights of (routed, dense), or [d, 1] of the dense branch alone; 0 at
        the start: half and half; None where the two are added.
    """

    def __init__(
        self,
        width: int,
        mlp_width: int,
        form: FeedForwardForm,
        mix: BranchMix,
        dropout_rate: float,
        scale: Scale,
        key: Key[Array, ""],
    ) -> None:
        self.dense = FeedForward(width, mlp_width, form, dropout_rate, scale, key)
        zeros = jnp.zeros((width, mix.logits))
        self.mix = nnx.Param(zeros, axes=("router", "router")) if mix.logits else None

    def __call__(
        self, x: Float[Array, "B L d"], routed: Float[Array, "B L d"], key: Key[Array, ""] | None
    ) -> Float[Array, "B L d"]:
        """Adds the branch: x and routed [B, L, d] to [B, L, d]; `key` None switches dropout off."""
        dense = self.dense(x, key)
        if self.mix is None:
            return routed + dense
        logits = jnp.einsum("bld,dn->bln", x.astype(jnp.float32), self.mix[...])
        if logits.shape[-1] == 1:
            return routed + jax.nn.sigmoid(logits).astype(x.dtype) * dense
        weights = jax.nn.softmax(logits).astype(x.dtype)
        return weights[..., :1] * routed + weights[..., 1:] * dense
