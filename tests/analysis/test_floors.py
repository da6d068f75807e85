"""The benchmark's floors against NumPy loops, in value, gradient and FLOPs."""

import jax
import numpy as np

from moe_jax.analysis.floors import balanced, dense

E, R, D, F = 3, 5, 4, 6


def numbers(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


ROWS, W_IN, W_OUT = numbers(0, E, R, D), numbers(1, E, D, F), numbers(2, E, F, D)
COTANGENT = numbers(3, E, R, D)


def loop(rows, w_in, w_out, cotangent):
    """One network on [R, d], row by row: outputs, the three gradients, and multiply-adds."""
    outputs, of_rows = np.zeros_like(rows), np.zeros_like(rows)
    of_in, of_out = np.zeros_like(w_in), np.zeros_like(w_out)
    products = 0
    for r, row in enumerate(rows):
        hidden = [max(sum(row[i] * w_in[i, j] for i in range(D)), 0) for j in range(F)]
        outputs[r] = [sum(hidden[j] * w_out[j, i] for j in range(F)) for i in range(D)]
        products += D * F + F * D
        for j in range(F):
            gradient = sum(cotangent[r, i] * w_out[j, i] for i in range(D)) * (hidden[j] > 0)
            of_out[j] += hidden[j] * cotangent[r]
            of_in[:, j] += gradient * row
            of_rows[r] += gradient * w_in[:, j]
    return outputs, (of_rows, of_in, of_out), products


def run(function, *arguments, cotangent):
    @jax.jit
    def both(cotangent, *arguments):
        outputs, pullback = jax.vjp(function, *arguments)
        return outputs, pullback(cotangent)

    return jax.device_get(both(cotangent, *arguments))


def test_balanced_is_each_experts_network_on_its_rows():
    outputs, gradients = run(balanced.apply, ROWS, W_IN, W_OUT, cotangent=COTANGENT)
    products = 0
    for e in range(E):
        want, of_all, of_expert = loop(ROWS[e], W_IN[e], W_OUT[e], COTANGENT[e])
        np.testing.assert_allclose(outputs[e], want, rtol=1e-5, atol=1e-5)
        for got, expected in zip(gradients, of_all, strict=True):
            np.testing.assert_allclose(got[e], expected, rtol=1e-5, atol=1e-5)
        products += of_expert
    assert balanced.flops(E, R, D, F) == 2 * products


def test_dense_is_one_network_on_all_rows():
    rows, cotangent = ROWS.reshape(-1, D), COTANGENT.reshape(-1, D)
    outputs, gradients = run(dense.apply, rows, W_IN[0], W_OUT[0], cotangent=cotangent)
    want, of_all, products = loop(rows, W_IN[0], W_OUT[0], cotangent)
    np.testing.assert_allclose(outputs, want, rtol=1e-5, atol=1e-5)
    for got, expected in zip(gradients, of_all, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    assert dense.flops(E * R, D, F) == 2 * products


def test_both_floors_make_the_same_number_of_flops_and_so_does_xla():
    assert dense.flops(E * R, D, F) == balanced.flops(E, R, D, F)
    for function, arguments in (
        (dense.apply, (ROWS.reshape(-1, D), W_IN[0], W_OUT[0])),
        (balanced.apply, (ROWS, W_IN, W_OUT)),
    ):
        counted = jax.jit(function).lower(*arguments).cost_analysis()["flops"]
        # XLA also counts the E * R * f comparisons of the ReLU.
        assert counted - E * R * F == dense.flops(E * R, D, F)


def test_floors_compute_in_the_dtype_of_the_rows():
    low = jax.numpy.bfloat16
    assert jax.eval_shape(balanced.apply, ROWS.astype(low), W_IN, W_OUT).dtype == low
    assert jax.eval_shape(dense.apply, ROWS[0].astype(low), W_IN[0], W_OUT[0]).dtype == low
