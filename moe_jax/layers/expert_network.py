"""The feed-forward network of an expert, as the dispatches run it.

Axis letters: E experts, d width, f expert width, of which a device has f/model.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.dispatch.interface import Network, Product
from moe_jax.layers.feed_forward import FeedForwardForm, HiddenBias
from moe_jax.parallel.mesh import MODEL


@dataclasses.dataclass(frozen=True)
class FeedForwardExpert:
    """The form with this device's slice of f: a `moe_jax.dispatch.interface.Network`.

    Weights are by the names of `FeedForwardForm.shapes`; b_out is this device's share of it, so that
    the sum over `model` has it once.

    Attributes:
      form: activation, gate and biases.
      dropout_rate: between the two products.
    """

    form: FeedForwardForm
    dropout_rate: float

    def up(
        self, weights: dict[str, jax.Array], rows: jax.Array, product: Product
    ) -> dict[str, jax.Array]:
        """[..., d] to what the activation is applied to, and the gated half: [..., f/model] each."""
        hidden = {}
        for name in ("in", "gate") if self.form.gated else ("in",):
            hidden[name] = product(rows, weights[f"w_{name}"])
            if self.form.bias:
                hidden[name] += _of_each_row(weights[f"b_{name}"], rows, product)
        return hidden

    def down(
        self,
        weights: dict[str, jax.Array],
        hidden: dict[str, jax.Array],
        keys: jax.Array | None,
        product: Product,
    ) -> jax.Array:
        """[..., f/model] to [..., d]."""
        if self.form.gated:
            active = self.form.activation(hidden["gate"]) * hidden["in"]
        else:
            active = self.form.activation(hidden["in"])
        if self.form.hidden_bias != HiddenBias.NONE:
            bias = _of_each_row(weights["b_hidden"], active, product)
            active = self.form.with_hidden_bias(active, bias)
        if keys is not None:
            active = _dropout(active, self.dropout_rate, keys)
        y = product(active, weights["w_out"])
        return y + _of_each_row(weights["b_out"], active, product) if self.form.bias else y


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

    def up(self, weights: dict[str, jax.Array], rows: jax.Array, product: Product) -> Any:
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
        weights: dict[str, jax.Array],
        hidden: Any,
        keys: jax.Array | None,
        product: Product,
    ) -> jax.Array:
        """The rest of the last layer; dropout is there only."""
        x, last = hidden
        y = self.one.down(_layer(weights, self.layers - 1), last, keys, product)
        return y + x / jax.lax.axis_size(MODEL)


def expert_network(form: FeedForwardForm, layers: int, dropout_rate: float) -> Network:
    """The network that a MoE's config asks for."""
    one = FeedForwardExpert(form, dropout_rate)
    return one if layers == 1 else ResidualExpert(one, layers)


def _layer(weights: dict[str, jax.Array], i: int) -> dict[str, jax.Array]:
    """Layer i of [E, layers, ...] weights, or of [layers, ...] of one expert."""
    return {
        name: w[..., i, :, :] if name.startswith("w_") else w[..., i, :]
        for name, w in weights.items()
    }


def _normalized(x: jax.Array) -> jax.Array:
    return jax.nn.standardize(x.astype(jnp.float32), axis=-1).astype(x.dtype)


def _of_each_row(bias: jax.Array, rows: jax.Array, product: Product) -> jax.Array:
    """The bias of each row's expert: a product with ones, because only `product` knows the expert.

    Args:
      bias: [E, f], or [f] of one expert.
      rows: [..., any], for its shape.
      product: see `Network`.
    """
    return product(jnp.ones_like(rows[..., :1]), bias[..., None, :])


def _dropout(hidden: jax.Array, rate: float, keys: jax.Array) -> jax.Array:
    """Dropout on [..., f/model] whose draw depends on the row's key [...], not on the mesh."""
    here = hidden.shape[-1]
    # Every device of `model` draws the mask of the whole width and uses its slice of it.
    width = here * jax.lax.axis_size(MODEL)
    draw = jnp.vectorize(
        lambda key: jax.random.bernoulli(key, 1 - rate, (width,)), signature="()->(f)"
    )
    keep = draw(keys)
    keep = jax.lax.dynamic_slice_in_dim(keep, jax.lax.axis_index(MODEL) * here, here, axis=-1)
    return jnp.where(keep, hidden / (1 - rate), 0).astype(hidden.dtype)
