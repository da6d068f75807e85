"""Experts that are stacks of feed-forward networks with residuals (BASE).

Axis letters: E experts, d width, f expert width.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from moe_jax.dispatch.interface import Product
from moe_jax.layers.expert_form import ExpertForm
from moe_jax.layers.feed_forward import FeedForwardExpert, FeedForwardForm
from moe_jax.layers.initializers import Scale
from moe_jax.parallel.mesh import MODEL


@dataclasses.dataclass
class ResidualForm(ExpertForm):
    """Several networks of one form, one after the other, each with a norm and a residual.

    Attributes:
      one: form of a network.
      layers: how many.
    """

    one: FeedForwardForm
    layers: int

    def axes(self) -> dict[str, tuple[str, ...]]:
        """See `ExpertForm.axes`."""
        axes = self.one.axes()
        return {name: (experts, "sublayers", *own) for name, (experts, *own) in axes.items()}

    def draw(
        self,
        leading: tuple[int, ...],
        width: int,
        mlp_width: int,
        scale: Scale,
        key: Key[Array, ""],
    ) -> dict[str, Float[Array, "..."]]:
        """See `ExpertForm.draw`."""
        return self.one.draw((*leading, self.layers), width, mlp_width, scale, key)

    def network(self, width: int, mlp_width: int, dropout_rate: float) -> "ResidualExpert":
        """See `ExpertForm.network`."""
        return ResidualExpert(self.one.network(width, mlp_width, dropout_rate), self.layers)


@dataclasses.dataclass(frozen=True)
class ResidualExpert:
    """A stack of networks x + one(norm(x)) (BASE, section 3.4; its norms' parameters are left out).

    Weights have another dimension, of the layers, before those of `one`'s.

    Attributes:
      one: network of a layer.
      layers: how many.
    """

    one: FeedForwardExpert
    layers: int

    def up(
        self,
        weights: dict[str, Float[Array, "..."]],
        rows: Float[Array, "*rows d"],
        product: Product,
    ) -> Any:
        """All layers but the last, and the first half of that."""
        x = rows
        for i in range(self.layers - 1):
            layer = _layer(weights, i)
            hidden = self.one.up(layer, _normalized(x), product)
            # The next layer reads the whole width, not this device's share of a sum.
            x = x + jax.lax.psum(self.one.down(layer, hidden, None, product), MODEL)
        return x, self.one.up(_layer(weights, self.layers - 1), _normalized(x), product)

    def down(
        self,
        weights: dict[str, Float[Array, "..."]],
        hidden: Any,
        keys: Key[Array, "*rows"] | None,
        product: Product,
    ) -> Float[Array, "*rows d"]:
        """The rest of the last layer; dropout is there only."""
        x, last = hidden
        y = self.one.down(_layer(weights, self.layers - 1), last, keys, product)
        return y + x / jax.lax.axis_size(MODEL)


def _layer(weights: dict[str, jax.Array], i: int) -> dict[str, jax.Array]:
    """Layer i of [E, layers, ...] weights, or of [layers, ...] of one expert."""
    return {
        name: w[..., i, :, :] if name.startswith("w_") else w[..., i, :]
        for name, w in weights.items()
    }


def _normalized(x: jax.Array) -> jax.Array:
    return jax.nn.standardize(x.astype(jnp.float32), axis=-1).astype(x.dtype)
