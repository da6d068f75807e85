"""What is read of programs for TPUs, beside numbers by hand. Run by `make test-tpu`."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.analysis.hlo import Program
from moe_jax.dispatch.grouped_matmul.interface import GroupedMatmul, grouped_matmul
from moe_jax.layers.attention_kernels import attend

pytestmark = pytest.mark.tpu


def shape(mesh, *dims, dtype=jnp.bfloat16):
    """Of an array that every device holds."""
    return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, PartitionSpec()))


def read(mesh, function, *arrays):
    """The program, and XLA's own count of its bytes."""
    with jax.set_mesh(mesh):
        compiled = jax.jit(function).lower(*arrays).compile()
    return Program(compiled.as_text()), compiled.cost_analysis()["bytes accessed"]


@pytest.mark.parametrize(("causal", "blocks"), [(True, 3), (False, 4)])
def test_flops_of_splash_attention_and_its_gradient(tpu_mesh, causal, blocks):
    # On each of 4 devices a row of 4 heads, and 2 x 2 blocks of 512 x 512 scores.
    qkv = [shape(tpu_mesh, 4, 1024, heads, 128) for heads in (4, 2, 2)]

    def loss(query, key, value):
        return attend(query, key, value, causal=causal).astype(jnp.float32).sum()

    program, _ = read(tpu_mesh, jax.grad(loss, argnums=(0, 1, 2)), *qkv)
    product = 2 * 4 * blocks * 512 * 512 * 128
    # The scores and their product with the values; with the gradients of the queries, or of keys and
    # values, two and three more, after the scores once more.
    found = {kernel.op_name.split("/")[-2]: kernel.flops for kernel in program.kernels()}
    assert found == {
        "splash_mha_fwd_residuals": 2 * product,
        "splash_mha_dq_no_residuals": 3 * product,
        "splash_mha_dkv_no_residuals": 4 * product,
    }


def test_flops_of_grouped_products(tpu_mesh):
    rows, groups, depth, width = 2048, 8, 512, 1024

    def gradients(rows, matrices, sizes):
        def loss(rows, matrices):
            product = grouped_matmul(rows, matrices, sizes, GroupedMatmul())
            return product.astype(jnp.float32).sum()

        return jax.grad(loss, argnums=(0, 1))(rows, matrices)

    whole = PartitionSpec()
    on_each = jax.shard_map(
        gradients, mesh=tpu_mesh, in_specs=whole, out_specs=whole, check_vma=False
    )
    program, _ = read(
        tpu_mesh,
        on_each,
        shape(tpu_mesh, rows, depth),
        shape(tpu_mesh, groups, depth, width),
        shape(tpu_mesh, groups, dtype=jnp.int32),
    )
    kernels = program.kernels()
    assert len(kernels) >= 2
    for kernel in kernels:
        assert kernel.flops == 2 * rows * depth * width
        assert kernel.bytes >= 2 * (rows * depth + rows * width)


@pytest.mark.parametrize("name", ["add", "softmax", "transpose", "slice"])
def test_programs_without_loops_move_what_xla_counts(tpu_mesh, name):
    x = shape(tpu_mesh, 8192, 8192, dtype=jnp.float32)
    function, arrays = {
        "add": (jnp.add, (x, x)),
        "softmax": (jax.nn.softmax, (x,)),
        "transpose": (lambda x: x.T + 1, (x,)),
        "slice": (
            lambda x, i: 2 * jax.lax.dynamic_slice(x, (i, 0), (1024, 8192)),
            (x, shape(tpu_mesh, dtype=jnp.int32)),
        ),
    }[name]
    program, counted = read(tpu_mesh, function, *arrays)
    assert program.memory_bytes().count == pytest.approx(counted, rel=0.01)


def test_what_is_fetched_ahead_is_counted_once(tpu_mesh):
    """XLA counts a matrix that goes into VMEM before it is used three times or more."""
    x = shape(tpu_mesh, 4096, 4096)
    program, counted = read(tpu_mesh, jnp.matmul, x, x)
    assert program.memory_bytes().count == 3 * 2 * 4096 * 4096
    assert counted > 1.5 * program.memory_bytes().count


def test_a_scan_takes_a_matrix_of_the_stack_in_each_trip(tpu_mesh):
    def scanned(x, matrices):
        return jax.lax.scan(lambda x, w: (jax.nn.relu(x @ w), None), x, matrices)[0]

    def count(length):
        stack = shape(tpu_mesh, length, 1024, 1024)
        program, _ = read(tpu_mesh, scanned, shape(tpu_mesh, 131072, 1024), stack)
        found = program.memory_bytes()
        assert found.exact
        return found.count

    matrix, rows = 2 * 1024 * 1024, 2 * 131072 * 1024
    # The matrix is read where it lies in the stack; the rows are read and written by the product,
    # and copied, because it cannot write over what it still reads.
    assert (count(20) - count(4)) / 16 == pytest.approx(matrix + 4 * rows, rel=1e-4)
