"""Grouped products compiled for GPUs. Run by `make test-gpu`."""

import jax
import jax.numpy as jnp
import pytest

from moe_jax.analysis.hlo import Program
from moe_jax.dispatch.grouped_matmul import tokamax
from moe_jax.dispatch.grouped_matmul.interface import Backend, GroupedMatmul, grouped_matmul
from tests.gpu.programs import (
    MOSAIC,
    TRITON,
    array,
    compiled,
    gpus,
    kernels,
    of_all_rows_and_groups,
)

pytestmark = pytest.mark.gpu

ROWS, GROUPS, DEPTH, WIDTH = 4096, 8, 512, 256


@pytest.fixture(scope="module")
def h100():
    return gpus("h100:1x1")


def product_and_gradients(mesh, backends, dtype=jnp.bfloat16):
    """Text and temporary bytes of the product, the transposed one and the outer one."""

    def function(lhs, rhs, sizes, gradient):
        result, pullback = jax.vjp(
            lambda lhs, rhs: grouped_matmul(lhs, rhs, sizes, backends), lhs, rhs
        )
        return result, *pullback(gradient)

    program = compiled(
        mesh,
        function,
        array(mesh, dtype, ROWS, DEPTH),
        array(mesh, dtype, GROUPS, DEPTH, WIDTH),
        array(mesh, jnp.int32, GROUPS),
        array(mesh, dtype, ROWS, WIDTH),
    )
    return program.as_text() or "", program.memory_analysis().temp_size_in_bytes


def installed(backend):
    names = {Backend.TOKAMAX_MOSAIC: "mosaic", Backend.TOKAMAX_TRITON: "triton"}
    return backend not in names or names[backend] in tokamax.available()


def test_tokamax_is_installed():
    assert "mosaic" in tokamax.available()


@pytest.mark.parametrize(
    ("backend", "target"),
    [
        pytest.param(Backend.TOKAMAX_MOSAIC, MOSAIC, id="mosaic"),
        # tokamax 0.0.17, the one for JAX 0.12, has none.
        *([(Backend.TOKAMAX_TRITON, TRITON)] if installed(Backend.TOKAMAX_TRITON) else []),
    ],
)
def test_each_operation_is_a_kernel_of_the_backend(h100, backend, target):
    text, temporary = product_and_gradients(h100, GroupedMatmul(backend, backend, backend))
    assert kernels(text) == [target] * 3
    assert not of_all_rows_and_groups(text, GROUPS, ROWS)
    found = Program(text).kernels()
    # All three multiply every row by one matrix, or a row by a row.
    assert [one.flops for one in found] == [2 * ROWS * DEPTH * WIDTH] * 3
    # What goes in and comes out, integers aside; less than once more is written in between.
    given = 2 * (2 * ROWS * DEPTH + 2 * ROWS * WIDTH + 2 * GROUPS * DEPTH * WIDTH)
    assert temporary < given
    for one in found:
        assert one.bytes >= 2 * (ROWS * min(DEPTH, WIDTH) + GROUPS * DEPTH * WIDTH)


def test_what_is_chosen_for_an_h100_are_kernels(h100):
    text, _ = product_and_gradients(h100, GroupedMatmul())
    chosen = kernels(text)
    assert len(chosen) == 3 and set(chosen) <= {MOSAIC, TRITON}
    assert not of_all_rows_and_groups(text, GROUPS, ROWS)
    assert not Program(text).matrix_products()


def test_the_reference_compiles_too(h100):
    backend = Backend.REFERENCE
    text, _ = product_and_gradients(h100, GroupedMatmul(backend, backend, backend))
    assert not kernels(text) and Program(text).matrix_products()


def test_ragged_dot_multiplies_all_rows_by_all_groups(h100):
    """Why nothing may choose it silently; XLA has no kernel of it for CUDA in jaxlib 0.10 to 0.12."""
    backend = Backend.RAGGED_DOT
    text, temporary = product_and_gradients(h100, GroupedMatmul(backend, backend, backend))
    flops = sum(one.flops for one in Program(text).matrix_products())
    assert flops >= 3 * GROUPS * 2 * ROWS * DEPTH * WIDTH
    assert temporary > 2 * GROUPS * ROWS * WIDTH
