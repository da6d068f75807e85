"""Experts on uneven numbers of rows, for CPUs: slots for the usual load, a loop for what spills.

Axis letters: T tokens, K choices per token, N = T * K assignments (token * K + choice; N stands for
none), E experts of this device, C slots per expert, R rows, M rows in a block, d width.

Batched products over slots are the fastest that XLA's CPU backend has, and a loop over blocks is
exact at any skew. Their gradient is written by hand for two reasons: the loop adds to the weight
gradients of the slots in place, where autodiff would make two and add them (14% of a layer's time
at 256 rows per expert); and the loop's hidden activations are computed anew instead of kept.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.dispatch.grouped_matmul.blocks import GemmBlock, for_each_block
from moe_jax.dispatch.interface import Network, batched_product, run
from moe_jax.dispatch.varying import varying_zeros


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Which assignments are worked on where.

    Attributes:
      use_slots: [] bool; if not, the loop does everything.
      slots: [E, C] int32 assignments in slots; N in empty ones.
      looped: [R] int32 assignments for the loop, sorted by expert; N beyond.
      sizes: [E] int32 of the loop.
      slot_keys, looped_keys: PRNG keys of the rows, or None.
      spill_room: where slots are used, no more than this many of `looped` are taken.
    """

    use_slots: jax.Array
    slots: jax.Array
    looped: jax.Array
    sizes: jax.Array
    slot_keys: jax.Array | None
    looped_keys: jax.Array | None
    spill_room: int = dataclasses.field(metadata={"static": True})


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gated_sums(
    network: Network, weights: Any, x: Float[Array, "T d"], gates: Float[Array, "T K"], rows: Rows
) -> Float[Array, "T d"]:
    """Each token's gate-weighted sum of expert outputs.

    Args:
      network: of one expert.
      weights: tree of [E, ...].
      x: [T, d].
      gates: [T, K] float32.
      rows: what is computed.

    Returns:
      [T, d] float32.
    """
    return _forward(network, weights, x, gates, rows)[0]


def _forward(
    network: Network, weights: Any, x: jax.Array, gates: jax.Array, rows: Rows
) -> tuple[jax.Array, Any]:
    def with_slots(weights: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        inputs = _take(x, rows.slots, gates)
        with jax.named_scope("experts"):
            hidden = network.up(weights, inputs, batched_product)
            outputs = network.down(weights, hidden, rows.slot_keys, batched_product)
        spill = _spill(rows)
        looped = _loop(network, weights, x, gates, spill)
        y = _gated_sum(outputs, rows.slots, gates) + _gated_sum(looped, spill.looped, gates)
        looped = jnp.pad(looped, ((0, rows.looped.size - rows.spill_room), (0, 0)))
        return y, (hidden, outputs, looped)

    def loop_alone(weights: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        _, kept = jax.eval_shape(with_slots, weights, x)
        like = (x, gates, *jax.tree.leaves(weights))
        hidden, outputs, _ = jax.tree.map(lambda a: varying_zeros(a.shape, a.dtype, *like), kept)
        looped = _loop(network, weights, x, gates, rows)
        return _gated_sum(looped, rows.looped, gates), (hidden, outputs, looped)

    y, kept = jax.lax.cond(rows.use_slots, with_slots, loop_alone, weights, x)
    return y, (weights, x, gates, rows, kept)


def _backward(network: Network, residuals: Any, gradient: jax.Array) -> tuple[Any, ...]:
    weights, x, gates, rows, (hidden, outputs, looped) = residuals
    like = (x, gradient, *jax.tree.leaves(weights))

    def zeros_like(a: jax.Array, dtype: Any) -> jax.Array:
        return varying_zeros(a.shape, dtype, *like)

    def with_slots(gradient: jax.Array) -> tuple[Any, jax.Array, jax.Array]:
        of_rows = _take(gradient, rows.slots, gates)
        of_gates = _sum_to_gates(zeros_like(gates, jnp.float32), of_rows * outputs, rows.slots)
        of_outputs = (of_rows * _gates(gates, rows.slots)[..., None]).astype(x.dtype)
        inputs = _take(x, rows.slots, gates)
        with jax.named_scope("experts"):
            _, down = jax.vjp(
                lambda w, h: network.down(w, h, rows.slot_keys, batched_product), weights, hidden
            )
            of_weights, of_hidden = down(of_outputs)
            _, up = jax.vjp(lambda w, r: network.up(w, r, batched_product), weights, inputs)
            of_weights_up, of_inputs = up(of_hidden)
        # In float32 from here on, because the loop adds to them block by block.
        of_weights = jax.tree.map(
            lambda a, b: a.astype(jnp.float32) + b.astype(jnp.float32), of_weights, of_weights_up
        )
        sums = (of_weights, _sum(of_inputs, rows.slots, gates), of_gates)
        spilled = looped[: rows.spill_room]
        return _loop_backward(network, weights, x, gates, _spill(rows), gradient, spilled, sums)

    def loop_alone(gradient: jax.Array) -> tuple[Any, jax.Array, jax.Array]:
        of_weights = jax.tree.map(lambda a: zeros_like(a, jnp.float32), weights)
        sums = (of_weights, zeros_like(x, jnp.float32), zeros_like(gates, jnp.float32))
        return _loop_backward(network, weights, x, gates, rows, gradient, looped, sums)

    of_weights, of_x, of_gates = jax.lax.cond(rows.use_slots, with_slots, loop_alone, gradient)
    of_weights = jax.tree.map(lambda a, weight: a.astype(weight.dtype), of_weights, weights)
    return of_weights, of_x.astype(x.dtype), of_gates, None


gated_sums.defvjp(_forward, _backward)


def _loop(network: Network, weights: Any, x: jax.Array, gates: jax.Array, rows: Rows) -> jax.Array:
    """[R, d] outputs of the looped rows."""
    inputs = _take(x, rows.looped, gates)

    def body(block: GemmBlock, out: jax.Array) -> jax.Array:
        keys = None if rows.looped_keys is None else block.rows(rows.looped_keys)
        of_expert = jax.tree.map(block.of_expert, weights)
        return block.write(out, run(network, of_expert, block.rows(inputs), keys, jnp.matmul))

    zeros = varying_zeros(inputs.shape, inputs.dtype, inputs, gates, *jax.tree.leaves(weights))
    with jax.named_scope("experts"):
        return for_each_block(rows.sizes, rows.looped.size, body, zeros)


def _loop_backward(
    network: Network,
    weights: Any,
    x: jax.Array,
    gates: jax.Array,
    rows: Rows,
    gradient: jax.Array,
    outputs: jax.Array,
    sums: tuple[Any, jax.Array, jax.Array],
) -> tuple[Any, jax.Array, jax.Array]:
    """Adds the gradients of the looped rows, of which `outputs` [R, d] were made.

    Args:
      network, weights, x, gates, rows: see `gated_sums`.
      gradient: [T, d] float32 of its result.
      outputs: of `_loop`.
      sums: gradients so far of the weights, of x [T, d] float32 and of the gates [T, K].
    """
    inputs = _take(x, rows.looped, gates)
    of_rows = _take(gradient, rows.looped, gates)
    of_outputs = (of_rows * _gates(gates, rows.looped)[:, None]).astype(x.dtype)

    def body(block: GemmBlock, sums: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
        keys = None if rows.looped_keys is None else block.rows(rows.looped_keys)
        _, pullback = jax.vjp(
            lambda w, r: run(network, w, r, keys, jnp.matmul),
            jax.tree.map(block.of_expert, weights),
            block.rows(inputs),
        )
        block_weights, block_rows = pullback(block.own(block.rows(of_outputs)))
        of_weights = jax.tree.map(block.add_to_expert, sums[0], block_weights)
        return of_weights, block.write(sums[1], block_rows)

    of_weights, of_x, of_gates = sums
    like = (inputs, of_outputs, *jax.tree.leaves(weights))
    zeros = varying_zeros(inputs.shape, inputs.dtype, *like)
    with jax.named_scope("experts"):
        of_weights, of_inputs = for_each_block(
            rows.sizes, rows.looped.size, body, (of_weights, zeros)
        )
    of_gates = _sum_to_gates(of_gates, of_rows * outputs, rows.looped)
    return of_weights, of_x + _sum(of_inputs, rows.looped, gates), of_gates


def _spill(rows: Rows) -> Rows:
    """What is left for the loop where slots are used."""
    keys = rows.looped_keys
    return dataclasses.replace(
        rows,
        looped=rows.looped[: rows.spill_room],
        looped_keys=None if keys is None else keys[: rows.spill_room],
    )


@jax.named_scope("dispatch")
def _take(values: jax.Array, assignments: jax.Array, gates: jax.Array) -> jax.Array:
    """[..., d] of [T, d] the rows of the tokens of [...] assignments; 0 for none."""
    return values.at[assignments // gates.shape[1]].get(mode="fill", fill_value=0)


def _gates(gates: jax.Array, assignments: jax.Array) -> jax.Array:
    """[...] gates of [...] assignments; 0 for none."""
    return gates.reshape(-1).at[assignments].get(mode="fill", fill_value=0)


@jax.named_scope("combine")
def _sum(values: jax.Array, assignments: jax.Array, gates: jax.Array) -> jax.Array:
    """[T, d] float32 sums over tokens of [..., d] values of [...] assignments."""
    tokens, choices = gates.shape
    sums = varying_zeros((tokens, values.shape[-1]), jnp.float32, values, gates)
    wide = values.reshape(-1, values.shape[-1]).astype(jnp.float32)
    return sums.at[assignments.reshape(-1) // choices].add(wide, mode="drop")


@jax.named_scope("combine")
def _gated_sum(values: jax.Array, assignments: jax.Array, gates: jax.Array) -> jax.Array:
    return _sum(values * _gates(gates, assignments)[..., None], assignments, gates)


def _sum_to_gates(of_gates: jax.Array, products: jax.Array, assignments: jax.Array) -> jax.Array:
    """Adds to [T, K] the sums over the width of [..., d] products of [...] assignments."""
    flat = of_gates.reshape(-1).at[assignments.reshape(-1)]
    return flat.add(products.sum(axis=-1).reshape(-1), mode="drop").reshape(of_gates.shape)
