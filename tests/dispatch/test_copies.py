import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.dispatch.copies import Copies, copied, gated_sum, summed


@st.composite
def cases(draw):
    """(T, K, assignments): some assignments in any order, with rows for none between them."""
    tokens, choices = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    every = draw(st.permutations(range(tokens * choices)))
    served = every[: draw(st.integers(0, len(every)))]
    nobodys = [tokens * choices] * draw(st.integers(0 if served else 1, 5))
    return tokens, choices, draw(st.permutations([*served, *nobodys]))


def one_hot(assignments, tokens, choices):
    """[R, T, K], 1 where a row is for an assignment."""
    matrix = np.zeros((len(assignments), tokens * choices + 1))
    matrix[np.arange(len(assignments)), assignments] = 1
    return matrix[:, :-1].reshape(-1, tokens, choices)


@settings(deadline=None, max_examples=40)
@given(cases())
def test_values_and_gradients_are_those_of_products_with_ones(case):
    tokens, choices, assignments = case
    copies = Copies.of(jnp.asarray(assignments, jnp.int32), tokens, choices)
    ones = jnp.asarray(one_hot(assignments, tokens, choices))
    keys = jax.random.split(jax.random.key(0), 5)
    x, rows, of_rows, of_tokens = (
        jax.random.normal(key, (size, 3))
        for key, size in zip(keys, (tokens, *[len(assignments)] * 2, tokens), strict=False)
    )
    gates = jax.random.normal(keys[4], (tokens, choices))
    pairs = [
        (lambda x: copied(x, copies), lambda x: jnp.einsum("rtk,td->rd", ones, x), (x,), of_rows),
        (
            lambda rows: summed(rows, copies),
            lambda rows: jnp.einsum("rtk,rd->td", ones, rows),
            (rows,),
            of_tokens,
        ),
        (
            lambda rows, gates: gated_sum(rows, gates, copies),
            lambda rows, gates: jnp.einsum("rtk,rd,tk->td", ones, rows, gates),
            (rows, gates),
            of_tokens,
        ),
    ]
    for ours, plain, arguments, gradient in pairs:
        results = []
        for function in (ours, plain):
            y, pullback = jax.vjp(function, *arguments)
            results.append((y, *pullback(gradient)))
        for result, expected in zip(*results, strict=True):
            np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("what", ["copied", "summed", "gated_sum"])
def test_nothing_is_scattered_but_numbers_of_rows(what):
    """Nor is any float32 array of all rows made of bfloat16 ones."""
    tokens, choices, rows, width = 64, 4, 300, 8
    assignments = jnp.arange(rows, dtype=jnp.int32) % (tokens * choices + 1)
    x, y = jnp.ones((tokens, width), jnp.bfloat16), jnp.ones((rows, width), jnp.bfloat16)
    gates = jnp.ones((tokens, choices))

    def total(x, y, gates, assignments):
        copies = Copies.of(assignments, tokens, choices)
        of = {"copied": (x,), "summed": (y,), "gated_sum": (y, gates)}[what]
        result = {"copied": copied, "summed": summed, "gated_sum": gated_sum}[what](*of, copies)
        return (result.astype(jnp.float32) ** 2).sum()

    lowered = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(x, y, gates, assignments)
    text = lowered.as_text()
    scattered = re.findall(r"stablehlo\.scatter.*?\n(?:.*\n)*?.*?-> tensor<([^>]*)>", text)
    assert scattered == [f"{tokens * choices}xi32"]
    assert f"{tokens}x{choices}x{width}x" not in text
