"""Long short-term memory.

Axis letters: B batch, L length, d input width, u units, r output width, which recurs.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from moe_jax.layers.initializers import scaled_truncated_normal
from moe_jax.parallel.sharding import constrain

# The forget gate's bias at the start, so that cells remember before they have learned anything else
# (Gers et al. 2000; Jozefowicz et al. 2015, section 2.2).
FORGET_BIAS = 1.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LSTMState:
    """What recurs.

    Attributes:
      cell: [B, u] float32.
      output: [B, r] in the compute dtype.
    """

    cell: jax.Array
    output: jax.Array


# (state, [B, 4, u] float32 sums of what the gates read of the inputs, [B] bool real) -> next state.
Step = Callable[[LSTMState, jax.Array, jax.Array], LSTMState]


class LSTM(nnx.Module):
    """LSTM with forget gates and without peepholes (Hochreiter & Schmidhuber 1997; Gers et al. 2000).

    With [i, f, g, o] = x W_in + y W_recurrent + b, the next cell is
    sigmoid(f) * cell + sigmoid(i) * tanh(g), and the output sigmoid(o) * tanh(cell), which is
    projected where r is not u (Sak et al. 2014).

    Attributes:
      w_in: [d, 4, u] float32.
      w_recurrent: [r, 4, u] float32.
      bias: [4, u] float32.
      projection: [u, r] float32; None where r is u.
    """

    def __init__(
        self,
        width: int,
        units: int,
        output_width: int,
        scale: float,
        unroll: bool,
        key: Key[Array, ""],
    ) -> None:
        """Draws the parameters.

        Args:
          width: d.
          units: u.
          output_width: r.
          scale: s of the truncated normal with variance s / fan_in, which is d + r.
          unroll: unroll the loop over time (longer compilation; exact FLOP counts by XLA).
          key: PRNG key.
        """
        in_key, recurrent_key, out_key = jax.random.split(key, 3)
        fan_in = width + output_width
        axes = ("embed", "gates", "units")
        self.w_in = nnx.Param(
            scaled_truncated_normal(in_key, (width, 4, units), fan_in, scale), axes=axes
        )
        self.w_recurrent = nnx.Param(
            scaled_truncated_normal(recurrent_key, (output_width, 4, units), fan_in, scale),
            axes=axes,
        )
        self.bias = nnx.Param(jnp.zeros((4, units)).at[1].set(FORGET_BIAS), axes=("gates", "units"))
        self.projection = (
            None
            if output_width == units
            else nnx.Param(
                scaled_truncated_normal(out_key, (units, output_width), units, scale),
                axes=("units", "embed"),
            )
        )
        self.unroll = unroll

    @jax.named_scope("lstm")
    def __call__(
        self,
        x: Float[Array, "B L d"],
        mask: Bool[Array, "B L"],
        state: LSTMState | None = None,
        reverse: bool = False,
    ) -> tuple[Float[Array, "B L r"], LSTMState]:
        """Runs over time.

        Args:
          x: [B, L, d].
          mask: [B, L] bool; False for padding, over which the state stays as it is.
          state: before the first token; None for zeros.
          reverse: from the last token to the first.

        Returns:
          [B, L, r], and the state after the last token.
        """
        step = self.recurrence(x.dtype)
        start = self.empty_state(x.shape[0], x.dtype) if state is None else state

        def body(
            state: LSTMState, inputs: tuple[jax.Array, jax.Array]
        ) -> tuple[LSTMState, jax.Array]:
            state = step(state, *inputs)
            return state, state.output

        end, y = jax.lax.scan(
            body, start, (self.of_inputs(x), mask.T), reverse=reverse, unroll=self.unroll
        )
        return constrain(y.swapaxes(0, 1), "batch", "length", "width"), end

    def empty_state(self, batch: int, dtype: jnp.dtype) -> LSTMState:
        """Zeros for B rows."""
        output_width, _, units = self.w_recurrent.shape
        return LSTMState(
            constrain(jnp.zeros((batch, units)), "batch", "units"),
            constrain(jnp.zeros((batch, output_width), dtype), "batch", "width"),
        )

    def of_inputs(self, x: Float[Array, "B L d"]) -> Float[Array, "L B 4 u"]:
        """What the gates read of inputs [B, L, d], for all steps in one product: [L, B, 4, u]."""
        gates = jnp.einsum(
            "bld,dgu->lbgu", x, self.w_in[...].astype(x.dtype), preferred_element_type=jnp.float32
        )
        return constrain(gates + self.bias[...], "length", "batch", "gates", "units")

    def recurrence(self, dtype: jnp.dtype) -> Step:
        """One step in the compute dtype, with the weights gathered once for all steps."""
        w_recurrent = constrain(self.w_recurrent[...].astype(dtype), "width", "gates", "units")
        projection = None
        if self.projection is not None:
            projection = constrain(self.projection[...].astype(dtype), "units", "width")

        def step(state: LSTMState, inputs: jax.Array, real: jax.Array) -> LSTMState:
            recurrent = jnp.einsum(
                "br,rgu->bgu", state.output, w_recurrent, preferred_element_type=jnp.float32
            )
            i, f, g, o = jnp.moveaxis(inputs + recurrent, 1, 0)
            cell = jax.nn.sigmoid(f) * state.cell + jax.nn.sigmoid(i) * jnp.tanh(g)
            output = (jax.nn.sigmoid(o) * jnp.tanh(cell)).astype(dtype)
            if projection is not None:
                output = output @ projection
            return LSTMState(
                jnp.where(real[:, None], cell, state.cell),
                jnp.where(real[:, None], output, state.output),
            )

        return step
