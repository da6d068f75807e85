"""The feed-forward network: its form, the dense layer of that form, and experts of that form.

Axis letters: B batch, L length, E experts, d width, f feed-forward width, of which a device has
f/model.
"""

import dataclasses
import enum
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from moe_jax import special_functions
from moe_jax.dispatch.interface import Product
from moe_jax.layers.dropout import dropout
from moe_jax.layers.expert_form import ExpertForm
from moe_jax.layers.initializers import Scale, scaled_truncated_normal
from moe_jax.layers.projection import project
from moe_jax.parallel.mesh import MODEL
from moe_jax.parallel.sharding import constrain


class Activation(enum.StrEnum):
    """The function between the two matrices; GELU is the tanh approximation."""

    RELU = "relu"
    GELU = "gelu"
    GELU_EXACT = "gelu_exact"
    SILU = "silu"

    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:  # type: ignore[override]
        """Applies it elementwise."""
        return _FUNCTIONS[self](x)


_FUNCTIONS: dict[Activation, Callable[[jax.Array], jax.Array]] = {
    Activation.RELU: jax.nn.relu,
    Activation.GELU: lambda x: jax.nn.gelu(x, approximate=True),
    Activation.GELU_EXACT: special_functions.gelu,
    Activation.SILU: jax.nn.silu,
}


class HiddenBias(enum.StrEnum):
    """What a learned vector [f] does to the hidden layer after the activation (ST-MoE, section 5.3
    and appendix C): nothing, is added to it, multiplies it.
    """

    NONE = "none"
    ADDITIVE = "additive"
    MULTIPLICATIVE = "multiplicative"


# Dimension names of the experts' parameters, by the names of `FeedForwardForm.shapes`.
EXPERT_AXES: dict[str, tuple[str, ...]] = {
    "w_in": ("experts", "expert_embed", "mlp"),
    "w_gate": ("experts", "expert_embed", "mlp"),
    "w_out": ("experts", "mlp", "expert_embed"),
    "b_in": ("experts", "mlp"),
    "b_gate": ("experts", "mlp"),
    "b_hidden": ("experts", "mlp"),
    "b_out": ("experts", "norm"),
}


@dataclasses.dataclass
class FeedForwardForm(ExpertForm):
    """act(x W_in) W_out, or gated: (act(x W_gate) * (x W_in)) W_out (Shazeer 2020).

    GEGLU is gated with GELU, SwiGLU gated with SILU.

    Attributes:
      activation: act.
      gated: with a third matrix, W_gate.
      bias: a bias after every matrix.
      hidden_bias: see `HiddenBias`.
    """

    activation: Activation = Activation.RELU
    gated: bool = False
    bias: bool = False
    hidden_bias: HiddenBias = HiddenBias.NONE

    def shapes(self, width: int, mlp_width: int) -> dict[str, tuple[int, ...]]:
        """Shape of each parameter of one network by name."""
        matrices: dict[str, tuple[int, ...]] = {"w_in": (width, mlp_width)}
        biases: dict[str, tuple[int, ...]] = {"b_in": (mlp_width,)}
        if self.gated:
            matrices["w_gate"], biases["b_gate"] = (width, mlp_width), (mlp_width,)
        matrices["w_out"], biases["b_out"] = (mlp_width, width), (width,)
        shapes = matrices | biases if self.bias else matrices
        if self.hidden_bias != HiddenBias.NONE:
            shapes["b_hidden"] = (mlp_width,)
        return shapes

    def axes(self) -> dict[str, tuple[str, ...]]:
        """See `ExpertForm.axes`."""
        return {name: EXPERT_AXES[name] for name in self.shapes(1, 1)}

    def draw(
        self,
        leading: tuple[int, ...],
        width: int,
        mlp_width: int,
        scale: Scale,
        key: Key[Array, ""],
    ) -> dict[str, Float[Array, "..."]]:
        """See `ExpertForm.draw`."""
        _, in_key, out_key = jax.random.split(key, 3)
        keys = {"w_in": in_key, "w_out": out_key, "w_gate": jax.random.fold_in(key, 4)}
        return {
            name: scaled_truncated_normal(keys[name], (*leading, *shape), shape[0], scale)
            if name in keys
            else self.initial_bias(name, (*leading, *shape))
            for name, shape in self.shapes(width, mlp_width).items()
        }

    def network(self, width: int, mlp_width: int, dropout_rate: float) -> "FeedForwardExpert":
        """See `ExpertForm.network`."""
        return FeedForwardExpert(self, dropout_rate)

    def initial_bias(self, name: str, shape: tuple[int, ...]) -> Float[Array, "..."]:
        """Biases start where they change nothing: at 0, or at 1 where they multiply."""
        multiplies = name == "b_hidden" and self.hidden_bias == HiddenBias.MULTIPLICATIVE
        return jnp.ones(shape) if multiplies else jnp.zeros(shape)

    def with_hidden_bias(
        self, hidden: Float[Array, "*rows f"], b_hidden: Float[Array, "... f"]
    ) -> Float[Array, "*rows f"]:
        """Adds or multiplies; shapes broadcast."""
        if self.hidden_bias == HiddenBias.MULTIPLICATIVE:
            return hidden * b_hidden
        return hidden + b_hidden


class FeedForward(nnx.Module):
    """The dense layer.

    Attributes:
      w_in, w_gate: [d, f] float32; w_gate only where the form is gated.
      w_out: [f, d] float32.
      b_in, b_gate, b_hidden: [f] float32, where the form has them.
      b_out: [d] float32.
    """

    def __init__(
        self,
        width: int,
        mlp_width: int,
        form: FeedForwardForm,
        dropout_rate: float,
        scale: Scale,
        key: Key[Array, ""],
    ) -> None:
        in_key, out_key = jax.random.split(key)
        keys = {"w_in": in_key, "w_out": out_key, "w_gate": jax.random.fold_in(key, 2)}
        self.form = nnx.static(form)
        self.dropout_rate = dropout_rate
        axes: dict[str, tuple[str, ...]] = {"w_out": ("mlp", "embed"), "b_out": ("norm",)}
        for name, shape in form.shapes(width, mlp_width).items():
            if name in keys:
                value = scaled_truncated_normal(keys[name], shape, shape[0], scale)
                of_hidden: tuple[str, ...] = ("embed", "mlp")
            else:
                value, of_hidden = form.initial_bias(name, shape), ("mlp",)
            setattr(self, name, nnx.Param(value, axes=axes.get(name, of_hidden)))

    def __call__(
        self, x: Float[Array, "B L d"], key: Key[Array, ""] | None
    ) -> Float[Array, "B L d"]:
        """[B, L, d] to [B, L, d]; `key` None switches dropout off."""
        form: FeedForwardForm = self.form
        hidden = self._up("in", x)
        if form.gated:
            hidden = form.activation(self._up("gate", x)) * hidden
        else:
            hidden = form.activation(hidden)
        if form.hidden_bias != HiddenBias.NONE:
            hidden = form.with_hidden_bias(hidden, self._weight("b_hidden", x))
        hidden = dropout(constrain(hidden, "batch", "length", "mlp"), self.dropout_rate, key)
        y = project(hidden, self._weight("w_out", x))
        return y + self._weight("b_out", x) if form.bias else y

    def _up(self, name: str, x: jax.Array) -> jax.Array:
        hidden = project(x, self._weight(f"w_{name}", x))
        if self.form.bias:
            hidden = hidden + self._weight(f"b_{name}", x)
        return hidden

    def _weight(self, name: str, x: jax.Array) -> jax.Array:
        return getattr(self, name)[...].astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class FeedForwardExpert:
    """The form with this device's slice of f: a `moe_jax.dispatch.interface.Network`.

    Weights are by the names of `FeedForwardForm.shapes`.

    Attributes:
      form: activation, gate and biases.
      dropout_rate: between the two products.
    """

    form: FeedForwardForm
    dropout_rate: float

    def up(
        self,
        weights: dict[str, Float[Array, "..."]],
        rows: Float[Array, "*rows d"],
        product: Product,
    ) -> dict[str, Float[Array, "*rows f"]]:
        """[..., d] to what the activation is applied to, and the gated half: [..., f/model] each."""
        hidden = {}
        for name in ("in", "gate") if self.form.gated else ("in",):
            hidden[name] = product(rows, weights[f"w_{name}"])
            if self.form.bias:
                hidden[name] += _of_each_row(weights[f"b_{name}"], rows, product)
        return hidden

    def down(
        self,
        weights: dict[str, Float[Array, "..."]],
        hidden: dict[str, Float[Array, "*rows f"]],
        keys: Key[Array, "*rows"] | None,
        product: Product,
    ) -> Float[Array, "*rows d"]:
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
        if not self.form.bias:
            return y
        # Each device of `model` adds its share, so that the sum over them has the bias once.
        share = weights["b_out"] / jax.lax.axis_size(MODEL)
        return y + _of_each_row(share, active, product)


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
