"""Grouped products by a loop over blocks of rows; made for CPUs.

Axis letters: R rows sorted by expert, E experts, M rows in a block, d and f widths.

A loop's number of trips depends on the routing. So no work is done for experts without rows,
whatever the skew; `lax.ragged_dot`, which on CPUs multiplies all rows by all experts, is beaten by
the number of experts. Every block reads its expert's weights anew, so blocks are as large as the
groups allow: there is one loop for each M of LADDER.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from moe_jax.dispatch.varying import varying_zeros

# (M, rows above which a block of M is used although it will not be full). Finer steps would waste
# fewer rows, but each takes half a second to compile, and a block costs as much as 55 rows before its
# first one (weights copied, their gradients added: d = 256, f = 1024, forward and backward).
LADDER = ((1024, 768), (256, 128), (128, 64), (64, 0))


class GemmBlock:
    """M consecutive rows, of which those from `first` up to `end` are one expert's."""

    def __init__(
        self,
        expert: Int[Array, ""],
        first: Int[Array, ""],
        end: Int[Array, ""],
        size: int,
        total: int,
    ) -> None:
        self.expert, self.size = expert, size
        # A block that would reach beyond the array starts earlier; `mine` leaves the others out.
        self.start = jnp.minimum(first, total - size)
        place = self.start + jnp.arange(size)
        self.mine = (place >= first) & (place < end)

    def rows(self, values: Shaped[Array, " R *row"]) -> Shaped[Array, " {self.size} *row"]:
        """[R, ...] to [M, ...]."""
        return jax.lax.dynamic_slice_in_dim(values, self.start, self.size)

    def own(self, values: Float[Array, "M w"]) -> Float[Array, "M w"]:
        """[M, w], 0 in rows of other experts."""
        return jnp.where(self.mine[:, None], values, 0)

    def of_expert(self, weight: Shaped[Array, " E *shape"]) -> Shaped[Array, "*shape"]:
        """[E, ...] to [...]."""
        return jax.lax.dynamic_index_in_dim(weight, self.expert, keepdims=False)

    def write(self, out: Float[Array, "R w"], values: Float[Array, "M w"]) -> Float[Array, "R w"]:
        """Puts [M, w] into [R, w], leaving rows of other experts as they are."""
        values = jnp.where(self.mine[:, None], values, self.rows(out))
        return jax.lax.dynamic_update_slice_in_dim(out, values, self.start, 0)

    def add_to_expert(
        self, out: Float[Array, " E *shape"], values: Float[Array, "*shape"]
    ) -> Float[Array, " E *shape"]:
        """Adds [...] to the expert's part of [E, ...]."""
        # Not .at[].add, which is a scatter and slower to compile and to run.
        total = self.of_expert(out) + values.astype(out.dtype)
        return jax.lax.dynamic_update_index_in_dim(out, total, self.expert, 0)


def for_each_block(
    sizes: Int[Array, " E"], total: int, body: Callable[[GemmBlock, Any], Any], carry: Any
) -> Any:
    """Folds `body` over blocks that together hold every row of each expert once.

    Args:
      sizes: [E] int32 rows of each expert.
      total: R.
      body: (block, carry) -> carry.
      carry: the first one; inside a shard_map, it must vary as the body's result does.
    """
    ends = jnp.cumsum(sizes)
    starts = ends - sizes
    for size, partly in LADDER:
        if size > total and size != LADDER[-1][0]:
            continue
        counts = (ends - starts + size - partly - 1) // size
        last = jnp.cumsum(counts)

        def step(
            i: jax.Array,
            carry: Any,
            size: int = min(size, total),
            starts: jax.Array = starts,
            counts: jax.Array = counts,
            last: jax.Array = last,
        ) -> Any:
            expert = jnp.sum(last <= i)
            first = starts[expert] + (i - last[expert] + counts[expert]) * size
            end = jnp.minimum(first + size, ends[expert])
            return body(GemmBlock(expert, first, end, size, total), carry)

        if total:
            carry = jax.lax.fori_loop(0, last[-1], step, carry)
        starts = jnp.minimum(starts + counts * size, ends)
    return carry


def product(
    lhs: Float[Array, "R d"],
    rhs: Float[Array, "E d f"] | Float[Array, "E f d"],
    group_sizes: Int[Array, " E"],
    transpose_rhs: bool,
) -> Float[Array, "R f"]:
    """Each row times its group's matrix: [R, d] and [E, d, f] ([E, f, d] transposed) to [R, f]."""
    width = rhs.shape[1] if transpose_rhs else rhs.shape[2]

    def body(block: GemmBlock, out: jax.Array) -> jax.Array:
        weight = block.of_expert(rhs)
        values = block.rows(lhs) @ (weight.T if transpose_rhs else weight)
        return block.write(out, values)

    zeros = varying_zeros((lhs.shape[0], width), lhs.dtype, lhs, rhs, group_sizes)
    return for_each_block(group_sizes, lhs.shape[0], body, zeros)


def outer(
    lhs: Float[Array, "R d"], gradient: Float[Array, "R f"], group_sizes: Int[Array, " E"]
) -> Float[Array, "E d f"]:
    """Each group's lhs^T gradient: [R, d] and [R, f] to [E, d, f] float32."""

    def body(block: GemmBlock, out: jax.Array) -> jax.Array:
        values = jnp.matmul(
            block.own(block.rows(lhs)).T, block.rows(gradient), preferred_element_type=jnp.float32
        )
        return block.add_to_expert(out, values)

    shape = (group_sizes.shape[0], lhs.shape[1], gradient.shape[1])
    zeros = varying_zeros(shape, jnp.float32, lhs, gradient, group_sizes)
    return for_each_block(group_sizes, lhs.shape[0], body, zeros)
