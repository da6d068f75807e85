"""The feed-forward layer: its form, which dense layers and experts share, and the dense layer.

Axis letters: B batch, L length, d width, f feed-forward width.
"""

import dataclasses
import enum
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax import special_functions
from moe_jax.component import Component
from moe_jax.layers.dropout import dropout
from moe_jax.layers.initializers import Scale, scaled_truncated_normal
from moe_jax.parallel.sharding import constrain


class Activation(enum.StrEnum):
    """The function between the two matrices; GELU is the tanh approximation."""

    RELU = "relu"
    GELU = "gelu"
    GELU_EXACT = "gelu_exact"
    SILU = "silu"

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]
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


@dataclasses.dataclass
class FeedForwardForm(Component):
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

    def initial_bias(self, name: str, shape: tuple[int, ...]) -> jax.Array:
        """Biases start where they change nothing: at 0, or at 1 where they multiply."""
        multiplies = name == "b_hidden" and self.hidden_bias == HiddenBias.MULTIPLICATIVE
        return jnp.ones(shape) if multiplies else jnp.zeros(shape)

    def with_hidden_bias(self, hidden: jax.Array, b_hidden: jax.Array) -> jax.Array:
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
        key: jax.Array,
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

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
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
        y = jnp.einsum("blf,fd->bld", hidden, self._weight("w_out", x))
        return y + self._weight("b_out", x) if form.bias else y

    def _up(self, name: str, x: jax.Array) -> jax.Array:
        hidden = jnp.einsum("bld,df->blf", x, self._weight(f"w_{name}", x))
        if self.form.bias:
            hidden = hidden + self._weight(f"b_{name}", x)
        return hidden

    def _weight(self, name: str, x: jax.Array) -> jax.Array:
        return getattr(self, name)[...].astype(x.dtype)
