"""Rows that are copies of tokens, and sums over a token's rows: gathers in both directions.

Axis letters: T tokens, K choices per token, N = T * K assignments (token * K + choice; the number N
stands for none), R rows, d width.

A token's sum could as well be a scatter that adds rows to tokens, which is what autodiff makes of the
gradient of a copy. On GPUs that adds in another order in every run, in the dtype of the rows or in a
float32 copy of all of them. A gather for each choice does neither, so both gradients are written by hand
here: the gradient of a copy is a sum, and that of a sum a copy.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Copies:
    """Which row is for which assignment.

    Attributes:
      assignments: [R] int32, N where a row is for none; each assignment has one row at most.
      rows: [T, K] int32, R where an assignment has no row.
    """

    assignments: jax.Array
    rows: jax.Array

    @classmethod
    def of(cls, assignments: Int[Array, "*R"], tokens: int, choices: int) -> "Copies":
        """Of rows whose assignments are [...], which are numbered as if in one dimension."""
        flat = assignments.reshape(-1)
        number = jnp.arange(flat.size, dtype=jnp.int32)
        rows = jnp.full_like(flat, flat.size, shape=tokens * choices)
        # Each row for none has a place of its own beyond the end, because places must be unique.
        places = jnp.where(flat < rows.size, flat, rows.size + number)
        rows = rows.at[places].set(number, mode="drop", unique_indices=True)
        return cls(flat, rows.reshape(tokens, choices))

    @property
    def tokens(self) -> Int[Array, " R"]:
        """[R] int32, T where a row is for none."""
        return self.assignments // self.rows.shape[1]


@jax.custom_vjp
def copied(x: Float[Array, "T d"], copies: Copies) -> Float[Array, "R d"]:
    """[R, d] the tokens [T, d] that rows are copies of; 0 for none."""
    return x.at[copies.tokens].get(mode="fill", fill_value=0)


def _copied_forward(x: jax.Array, copies: Copies) -> tuple[jax.Array, Copies]:
    return copied(x, copies), copies


def _copied_backward(copies: Copies, gradient: jax.Array) -> tuple[jax.Array, None]:
    return _sums(gradient, copies, None).astype(gradient.dtype), None


copied.defvjp(_copied_forward, _copied_backward)


@jax.custom_vjp
def summed(rows: Float[Array, "R d"], copies: Copies) -> Float[Array, "T d"]:
    """[T, d] sums over each token's rows [R, d], in float32 on the way."""
    return _sums(rows, copies, None).astype(rows.dtype)


def _summed_forward(rows: jax.Array, copies: Copies) -> tuple[jax.Array, Copies]:
    return summed(rows, copies), copies


def _summed_backward(copies: Copies, gradient: jax.Array) -> tuple[jax.Array, None]:
    return copied(gradient, copies), None


summed.defvjp(_summed_forward, _summed_backward)


@jax.custom_vjp
def gated_sum(
    rows: Float[Array, "R d"], gates: Float[Array, "T K"], copies: Copies
) -> Float[Array, "T d"]:
    """[T, d] float32 sums over each token's rows [R, d] times their gates [T, K] float32."""
    return _sums(rows, copies, gates)


def _gated_sum_forward(
    rows: jax.Array, gates: jax.Array, copies: Copies
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, Copies]]:
    return gated_sum(rows, gates, copies), (rows, gates, copies)


def _gated_sum_backward(
    residuals: tuple[jax.Array, jax.Array, Copies], gradient: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    rows, gates, copies = residuals
    of_gates = [
        (gradient * _chosen(rows, copies, choice)).sum(axis=-1) for choice in range(gates.shape[1])
    ]
    gate = gates.reshape(-1).at[copies.assignments].get(mode="fill", fill_value=0)
    # The result is rounded to the rows' dtype by who asked for it, so nothing is lost here.
    of_rows = copied(gradient.astype(rows.dtype), copies) * gate[:, None]
    return of_rows.astype(rows.dtype), jnp.stack(of_gates, axis=1), None


gated_sum.defvjp(_gated_sum_forward, _gated_sum_backward)


def _sums(rows: jax.Array, copies: Copies, gates: jax.Array | None) -> jax.Array:
    """[T, d] float32; one choice after the other, so that no array is of [T, K, d]."""
    sums = jnp.zeros((), jnp.float32)
    for choice in range(copies.rows.shape[1]):
        values = _chosen(rows, copies, choice)
        sums = sums + (values if gates is None else values * gates[:, choice, None])
    return sums


def _chosen(rows: jax.Array, copies: Copies, choice: int) -> jax.Array:
    """[T, d] float32 each token's row of one choice; 0 where it has none."""
    chosen = rows.at[copies.rows[:, choice]].get(mode="fill", fill_value=0)
    return chosen.astype(jnp.float32)
