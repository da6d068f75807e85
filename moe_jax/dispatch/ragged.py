"""The ragged all-to-all: every device sends another number of rows to every other one.

Axis letters: R rows, d width; X devices along the mesh axis.

XLA's CPU backend lacks it; there, another program with the same arguments and result takes its
place, so that the offsets that TPUs and GPUs will use are the ones that tests on CPUs have checked.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routes:
    """Which rows of this device go where; all [X] int32.

    Attributes:
      input_offsets: first row, in this device's operand, of what each device gets.
      send_sizes: number of rows that each device gets.
      output_offsets: where those begin in the result of the device that gets them.
      receive_sizes: number of rows that come from each device.
    """

    input_offsets: jax.Array
    send_sizes: jax.Array
    output_offsets: jax.Array
    receive_sizes: jax.Array


def plan(sizes: Int[Array, " X"], axis: str, receive_rows: int) -> tuple[Routes, Routes]:
    """Routes there and back, where each device puts what it receives in the order of senders.

    What does not fit into `receive_rows` is not sent: devices later in the order lose rows first.

    Args:
      sizes: [X] int32 rows that this device has for each device, stored in that order.
      axis: name of the mesh axis.
      receive_rows: rows that each device has room for.

    Returns:
      (there, back); `there.send_sizes` is what is left of `sizes`.
    """
    me = jax.lax.axis_index(axis)
    wanted = jax.lax.all_gather(sizes, axis)  # [from, to]
    ends = jnp.minimum(jnp.cumsum(wanted, axis=0), receive_rows)
    starts = jnp.concatenate([jnp.zeros_like(ends[:1]), ends[:-1]])
    sent = ends - starts
    input_starts = jnp.cumsum(wanted, axis=1) - wanted
    there = Routes(input_starts[me], sent[me], starts[me], sent[:, me])
    back = Routes(starts[:, me], sent[:, me], input_starts[:, me], sent[me])
    return there, back


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 3))
def exchange(
    rows: Shaped[Array, " R *row"], result_rows: int, routes: tuple[Routes, Routes], axis: str
) -> Shaped[Array, " received *row"]:
    """Sends rows along `routes[0]`; gradients return along `routes[1]`.

    Args:
      rows: [R, ...] operand of the routes there.
      result_rows: rows of the result.
      routes: (there, back) of `plan`, or the two swapped.
      axis: name of the mesh axis.

    Returns:
      [result_rows, ...], 0 where nothing was received.
    """
    result = jnp.zeros_like(rows, shape=(result_rows, *rows.shape[1:]))
    there = routes[0]
    return ragged_all_to_all(
        rows,
        result,
        there.input_offsets,
        there.send_sizes,
        there.output_offsets,
        there.receive_sizes,
        axis_name=axis,
    )


def _exchange_forward(
    rows: jax.Array, result_rows: int, routes: tuple[Routes, Routes], axis: str
) -> tuple[jax.Array, tuple[int, tuple[Routes, Routes]]]:
    return exchange(rows, result_rows, routes, axis), (rows.shape[0], routes)


def _exchange_backward(
    result_rows: int,
    axis: str,
    residuals: tuple[int, tuple[Routes, Routes]],
    gradient: jax.Array,
) -> tuple[jax.Array, None]:
    operand_rows, (there, back) = residuals
    # jax's own transpose would send the offsets to and fro once more; the way back is known here.
    return exchange(gradient, operand_rows, (back, there), axis), None


exchange.defvjp(_exchange_forward, _exchange_backward)


def ragged_all_to_all(
    operand: Shaped[Array, " R *row"],
    output: Shaped[Array, " rows *row"],
    input_offsets: Int[Array, " slices"],
    send_sizes: Int[Array, " slices"],
    output_offsets: Int[Array, " slices"],
    recv_sizes: Int[Array, " slices"],
    *,
    axis_name: str,
) -> Shaped[Array, " rows *row"]:
    """`jax.lax.ragged_all_to_all` on accelerators, `by_all_gather` on CPUs.

    Args:
      operand: [R, ...] rows to send.
      output: [rows, ...] what the result is where nothing is received.
      input_offsets, send_sizes, output_offsets, recv_sizes: [X] int32; see `Routes`.
      axis_name: name of the mesh axis.
    """
    arguments = (operand, output, input_offsets, send_sizes, output_offsets, recv_sizes)
    return jax.lax.platform_dependent(
        *arguments,
        cpu=functools.partial(by_all_gather, axis_name=axis_name),
        default=functools.partial(jax.lax.ragged_all_to_all, axis_name=axis_name),
    )


def by_all_gather(
    operand: Shaped[Array, " R *row"],
    output: Shaped[Array, " rows *row"],
    input_offsets: Int[Array, " slices"],
    send_sizes: Int[Array, " slices"],
    output_offsets: Int[Array, " slices"],
    recv_sizes: Int[Array, " slices"],
    *,
    axis_name: str,
) -> Shaped[Array, " rows *row"]:
    """The ragged all-to-all by an all-gather, with the same arguments; sends X times the rows."""
    offsets = jnp.stack([input_offsets, send_sizes, output_offsets], axis=1)
    # What the others have for this device: [slices, 3], in the order of senders.
    begin, size, place = jax.lax.all_to_all(offsets, axis_name, 0, 0, tiled=True).T
    size = jnp.minimum(size, recv_sizes)  # Equal, unless a caller's arguments are wrong.
    sender = jnp.arange(len(size)) // (len(size) // jax.lax.axis_size(axis_name))
    row = jnp.arange(output.shape[0])[:, None]
    received = (row >= place) & (row < place + size)  # [rows, slices]
    source = jnp.where(received, sender * operand.shape[0] + begin + row - place, 0).sum(axis=1)
    everything = jax.lax.all_gather(operand, axis_name, tiled=True)
    mine = received.any(axis=1).reshape(-1, *[1] * (output.ndim - 1))
    return jnp.where(mine, everything[source], output)
