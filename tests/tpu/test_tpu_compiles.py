"""Programs for TPUs, compiled by libtpu on a machine that has none. Run by `make test-tpu`."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.analysis.hlo import Program
from moe_jax.dispatch.dropless import Dropless
from moe_jax.dispatch.exchange import Wire
from moe_jax.dispatch.grouped_matmul.interface import Backend, GroupedMatmul, grouped_matmul
from moe_jax.layers.mode import Mode
from moe_jax.layers.moe import MoE, MoEConfig, TokenInfo
from moe_jax.parallel.mesh import EXPERT
from moe_jax.routing.token_choice import TopK

pytestmark = pytest.mark.tpu

SHARD = PartitionSpec(EXPERT)


def global_array(mesh, shape, dtype):
    """The shape of an array of which each device holds `shape`."""
    whole = (mesh.shape[EXPERT] * shape[0], *shape[1:])
    return jax.ShapeDtypeStruct(whole, dtype, sharding=NamedSharding(mesh, SHARD))


def compile_for(mesh, function, *arrays):
    """Of a function of one device's arrays; the first dimension of all is split over `expert`."""
    split = jax.shard_map(function, mesh=mesh, in_specs=(SHARD,) * len(arrays), out_specs=SHARD)
    return jax.jit(split).lower(*arrays).compile()


def compile_grouped(mesh, backends, rows, groups, depth, width, dtype):
    """(compiled value and gradients, bytes of what goes in and comes out) on each device."""

    def value_and_gradients(lhs, rhs, sizes, gradient):
        result, pullback = jax.vjp(
            lambda lhs, rhs: grouped_matmul(lhs, rhs, sizes, backends), lhs, rhs
        )
        return result, *pullback(gradient)

    shapes = (rows, depth), (groups, depth, width), (rows, width)
    lhs, rhs, gradient = (global_array(mesh, shape, dtype) for shape in shapes)
    sizes = global_array(mesh, (groups,), jnp.int32)
    compiled = compile_for(mesh, value_and_gradients, lhs, rhs, sizes, gradient)
    return compiled, 2 * sum(map(math.prod, shapes)) * jnp.dtype(dtype).itemsize


def kernels(text):
    return text.count('custom_call_target="tpu_custom_call"')


def of_all_rows_and_groups(text, groups, rows):
    """Arrays of [groups, rows, width], as products of all rows with all groups have them."""
    return re.findall(rf"\w+\[{groups},{rows},\d\d+\]", text)


@pytest.mark.parametrize(
    ("rows", "groups", "depth", "width", "dtype", "temporary"),
    [
        # Mixtral's experts over 4 devices. The result before its rows are masked is a fifth.
        (8192, 2, 4096, 14336, jnp.bfloat16, 0.25),
        # Groups smaller than a tile.
        (4096, 64, 512, 1024, jnp.float32, 0.1),
        # Nothing is a multiple of a tile, so arrays are copied into larger ones.
        (4000, 32, 96, 200, jnp.bfloat16, 2),
    ],
)
def test_grouped_products_are_kernels(tpu_mesh, rows, groups, depth, width, dtype, temporary):
    """`temporary`: bytes allowed, relative to all that goes in and comes out."""
    compiled, given = compile_grouped(tpu_mesh, GroupedMatmul(), rows, groups, depth, width, dtype)
    text = compiled.as_text()
    assert kernels(text) == 3
    assert not of_all_rows_and_groups(text, groups, rows)
    assert compiled.memory_analysis().temp_size_in_bytes < temporary * given


def test_products_by_ragged_dot_are_kernels(tpu_mesh):
    """Not asserted of its gradient of the matrices: libtpu 0.0.42 makes E times the work of it."""
    rows, groups = 2048, 8
    backends = GroupedMatmul(Backend.RAGGED_DOT, Backend.RAGGED_DOT, Backend.MEGABLOX)
    compiled, _ = compile_grouped(tpu_mesh, backends, rows, groups, 512, 1024, jnp.bfloat16)
    text = compiled.as_text()
    assert kernels(text) >= 3
    assert not of_all_rows_and_groups(text, groups, rows)


def test_ragged_all_to_all_and_its_gradient(tpu_mesh):
    rows, width = 1024, 256

    def exchange(operand, output, offsets, sizes):
        return jax.lax.ragged_all_to_all(
            operand, output, offsets, sizes, offsets, sizes, axis_name=EXPERT
        )

    def value_and_gradient(operand, output, offsets, sizes):
        result, pullback = jax.vjp(
            functools.partial(exchange, output=output, offsets=offsets, sizes=sizes), operand
        )
        return result, *pullback(result)

    values = global_array(tpu_mesh, (rows, width), jnp.bfloat16)
    per_device = global_array(tpu_mesh, (tpu_mesh.size,), jnp.int32)
    compiled = compile_for(tpu_mesh, value_and_gradient, values, values, per_device, per_device)
    found = re.findall(r"= \S+ ragged-all-to-all\S*\(", compiled.as_text())
    assert len(found) == 2
    assert "all-gather" not in compiled.as_text()


def test_the_dropless_layer_sends_rows_raggedly_and_multiplies_in_kernels(tpu_mesh):
    """The whole layer, with the gradients of everything."""
    width, experts, length = 256, 16, 256
    config = MoEConfig(TopK(k=2), group_size=length, dispatch=Dropless(wire=Wire.BFLOAT16))
    config.validate(experts)
    graph, state = nnx.split(
        nnx.eval_shape(lambda: MoE(config, width, 4 * width, experts, 1.0, jax.random.key(0)))
    )
    placement = {"w_in": PartitionSpec(EXPERT), "w_out": PartitionSpec(EXPERT)}
    parameters = {
        name: jax.tree.map(
            lambda leaf, name=name: jax.ShapeDtypeStruct(
                leaf.shape,
                leaf.dtype,
                sharding=NamedSharding(tpu_mesh, placement.get(name, PartitionSpec())),
            ),
            value,
        )
        for name, value in nnx.to_pure_dict(state).items()
    }

    def loss(parameters, x):
        info = TokenInfo.of(jnp.zeros(x.shape[:2], jnp.int32))
        y, _ = nnx.merge(graph, parameters)(x, info, Mode.TRAIN, None)
        return jnp.sum(y.astype(jnp.float32) ** 2)

    with jax.set_mesh(tpu_mesh):
        x = global_array(tpu_mesh, (2, length, width), jnp.bfloat16)
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(parameters, x).compile()
    text = compiled.as_text()
    assert kernels(text) == 6
    # Rows, gates and integers there, rows back; in the gradient all but the integers once more.
    assert len(re.findall(r"= \S+ ragged-all-to-all\S*\(", text)) == 7
    tokens = 2 * length
    gathered = [c for c in Program(text).collectives() if c.name == "all-gather"]
    assert all(c.elements < tokens for c in gathered), "tokens are gathered"
