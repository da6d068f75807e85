"""Every backend of the grouped product against a loop over groups in NumPy."""

import functools
import logging
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from moe_jax.configuration import decode, encode
from moe_jax.dispatch.grouped_matmul import blocks, interface, megablox
from moe_jax.dispatch.grouped_matmul.interface import Backend, GroupedMatmul, grouped_matmul
from moe_jax.errors import UserError

R, E, D, F = 40, 5, 8, 6
# What runs on CPUs.
PORTABLE = [Backend.REFERENCE, Backend.BLOCKS, Backend.RAGGED_DOT]
SIZES = {
    "balanced": (8, 8, 8, 8, 8),
    "first is empty": (0, 13, 9, 11, 7),
    "middle is empty": (13, 9, 0, 11, 7),
    "last is empty": (13, 9, 11, 7, 0),
    "one row": (0, 0, 1, 0, 0),
    "all in the last": (0, 0, 0, 0, 40),
    "rows beyond": (3, 5, 1, 7, 2),
    "no rows": (0, 0, 0, 0, 0),
}


def forced(backend):
    return GroupedMatmul(backend, backend, backend)


def arrays(rows=R, groups=E, depth=D, width=F, seed=0):
    rng = np.random.default_rng(seed)
    lhs = rng.normal(size=(rows, depth)).astype(np.float32)
    rhs = rng.normal(size=(groups, depth, width)).astype(np.float32)
    gradient = rng.normal(size=(rows, width)).astype(np.float32)
    return lhs, rhs, gradient


def loop(lhs, rhs, gradient, sizes):
    """(result, gradient of lhs, gradient of rhs)."""
    result, of_lhs, of_rhs = np.zeros_like(gradient), np.zeros_like(lhs), np.zeros_like(rhs)
    start = 0
    for group, size in enumerate(sizes):
        mine = slice(start, start + size)
        result[mine] = lhs[mine] @ rhs[group]
        of_lhs[mine] = gradient[mine] @ rhs[group].T
        of_rhs[group] = lhs[mine].T @ gradient[mine]
        start += size
    return result, of_lhs, of_rhs


@functools.partial(jax.jit, static_argnums=0)
def with_gradients(backend, lhs, rhs, gradient, sizes):
    result, pullback = jax.vjp(
        lambda lhs, rhs: grouped_matmul(lhs, rhs, sizes, forced(backend)), lhs, rhs
    )
    return result, *pullback(gradient)


def check(actual, expected, sizes):
    rows = sum(sizes)
    for got, want in zip(actual, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert not np.any(actual[0][rows:]) and not np.any(actual[1][rows:])
    assert not np.any(np.asarray(actual[2])[np.asarray(sizes) == 0])


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("backend", PORTABLE)
def test_value_and_gradients(backend, sizes):
    inputs = arrays()
    check(with_gradients(backend, *inputs, np.array(sizes)), loop(*inputs, sizes), sizes)


@pytest.mark.parametrize("backend", PORTABLE)
def test_one_group(backend):
    inputs = arrays(rows=7, groups=1)
    check(with_gradients(backend, *inputs, np.array([5])), loop(*inputs, [5]), [5])


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, R), min_size=E - 1, max_size=E - 1), st.integers(0, R))
@example([0, 0, 0, 0], 0)
def test_any_sizes(cuts, rows):
    ends = np.minimum(sorted(cuts), rows)
    sizes = np.diff([0, *ends, rows])
    inputs = arrays(seed=rows)
    for backend in PORTABLE:
        check(with_gradients(backend, *inputs, sizes), loop(*inputs, sizes), sizes)


@pytest.mark.parametrize("backend", PORTABLE)
def test_operations_may_differ_in_backend(backend):
    inputs = arrays()
    backends = GroupedMatmul(Backend.REFERENCE, backend, Backend.RAGGED_DOT)
    sizes = jnp.array(SIZES["rows beyond"])
    lhs, rhs, gradient = map(jnp.asarray, inputs)
    result, pullback = jax.vjp(lambda *a: grouped_matmul(*a, sizes, backends), lhs, rhs)
    check((result, *pullback(gradient)), loop(*inputs, sizes), sizes)


def test_group_offset_leaves_out_the_groups_of_others():
    sizes, here = np.array([7, 0, 9, 4, 11]), 2
    lhs, rhs, gradient = arrays()

    @jax.jit
    def compute(lhs, rhs, gradient, offset):
        result, pullback = jax.vjp(
            lambda lhs, rhs: grouped_matmul(lhs, rhs, jnp.array(sizes), GroupedMatmul(), offset),
            lhs,
            rhs,
        )
        return result, *pullback(gradient)

    for offset in range(E - here + 1):
        own = slice(offset, offset + here)
        rows = slice(sizes[:offset].sum(), sizes[: offset + here].sum())
        actual = compute(lhs, rhs[own], gradient, offset)
        expected = loop(lhs[rows], rhs[own], gradient[rows], sizes[own])
        for got, want in zip(actual[:2], expected[:2], strict=True):
            np.testing.assert_allclose(got[rows], want, rtol=1e-5, atol=1e-5)
            assert not np.any(np.delete(got, rows, axis=0))
        np.testing.assert_allclose(actual[2], expected[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", PORTABLE)
def test_bfloat16_is_summed_in_float32(backend):
    # In bfloat16, 256 + 1 is 256.
    lhs, rhs = jnp.ones((16, 512), jnp.bfloat16), jnp.ones((2, 512, 8), jnp.bfloat16)
    result = grouped_matmul(lhs, rhs, jnp.array([10, 6]), forced(backend))
    assert result.dtype == jnp.bfloat16
    np.testing.assert_array_equal(result.astype(np.float32), 512)


@pytest.mark.parametrize("backend", PORTABLE)
def test_inside_a_shard_map_it_equals_each_device_alone(backend):
    """Rows differ on all 8 devices, matrices on the 4 of `expert`; their gradients are summed."""
    mesh = jax.make_mesh((2, 4), ("data", "expert"), axis_types=(AxisType.Auto,) * 2)
    rows, groups = PartitionSpec(("data", "expert")), PartitionSpec("expert")
    lhs, rhs, gradient = arrays(rows=8 * 10, groups=4 * 2)
    sizes = np.array([[3, 5], [0, 10], [10, 0], [0, 0], [1, 1], [4, 6], [2, 0], [9, 1]], np.int32)

    def of_device(lhs, rhs, sizes):
        return grouped_matmul(lhs, rhs, sizes[0], forced(backend))

    def product(lhs, rhs):
        return jax.shard_map(of_device, mesh=mesh, in_specs=(rows, groups, rows), out_specs=rows)(
            lhs, rhs, sizes
        )

    @jax.jit
    def everything(lhs, rhs, gradient):
        result, pullback = jax.vjp(product, lhs, rhs)
        return result, *pullback(gradient)

    result, of_lhs, of_rhs = everything(lhs, rhs, gradient)
    expected_of_rhs = np.zeros_like(rhs)
    for device in range(8):
        mine, own = slice(10 * device, 10 * device + 10), slice(device % 4 * 2, device % 4 * 2 + 2)
        want = loop(lhs[mine], rhs[own], gradient[mine], sizes[device])
        np.testing.assert_allclose(result[mine], want[0], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(of_lhs[mine], want[1], rtol=1e-5, atol=1e-5)
        expected_of_rhs[own] += want[2]
    np.testing.assert_allclose(of_rhs, expected_of_rhs, rtol=1e-5, atol=1e-5)


# Megablox: its kernels, interpreted.

MEGABLOX_SIZES = [(0, 130, 37, 20), (100, 0, 99, 0), (0, 0, 0, 0), (1, 0, 0, 199), (64, 64, 64, 8)]


def test_megablox_interpreted():
    rows = 200  # Not a multiple of its tile of 128.
    inputs = arrays(rows=rows, groups=4)
    lhs, rhs, gradient = map(jnp.asarray, inputs)

    @jax.jit
    def compute(sizes):
        return (
            megablox.product(lhs, rhs, sizes, False, interpret=True),
            megablox.product(gradient, rhs, sizes, True, interpret=True),
            megablox.outer(lhs, gradient, sizes, interpret=True),
        )

    for sizes in MEGABLOX_SIZES:
        of_groups = sum(sizes)  # What is beyond is masked by the interface.
        actual = [np.asarray(a) for a in compute(jnp.array(sizes))]
        expected = loop(*inputs, sizes)
        np.testing.assert_allclose(
            actual[0][:of_groups], expected[0][:of_groups], rtol=1e-5, atol=1e-5
        )
        np.testing.assert_allclose(
            actual[1][:of_groups], expected[1][:of_groups], rtol=1e-5, atol=1e-5
        )
        np.testing.assert_allclose(actual[2], expected[2], rtol=1e-5, atol=1e-5)
        assert not np.any(actual[2][np.array(sizes) == 0])


@pytest.mark.parametrize(
    ("rows", "depth", "groups", "dtype", "expected"),
    [
        (8192, 4096, 8, jnp.bfloat16, (512, 1024, 1024)),
        (8192, 1536, 32, jnp.bfloat16, (256, 768, 1024)),
        (8192, 4096, 64, jnp.float32, (128, 512, 512)),
        (100, 96, 4, jnp.bfloat16, (128, 96, 1024)),
        (512, 1100, 4, jnp.bfloat16, (128, 1024, 1024)),
    ],
)
def test_megablox_tiles(rows, depth, groups, dtype, expected):
    assert megablox._tiling(jax.ShapeDtypeStruct((rows, depth), dtype), 2048, groups) == expected


# What another platform would run, as far as it can be followed without one.


BOTH, MOSAIC_ONLY, NONE = frozenset(["mosaic", "triton"]), frozenset(["mosaic"]), frozenset()


def pretend(monkeypatch, platform, capability=0.0, available=BOTH):
    monkeypatch.setattr(interface, "platform_in_force", lambda: platform)
    monkeypatch.setattr(interface, "nvidia_capability", lambda: capability)
    monkeypatch.setattr(interface.tokamax, "available", lambda: available)


def test_pallas_kernels_lower_inside_a_shard_map(monkeypatch):
    pretend(monkeypatch, "tpu")
    mesh = jax.make_mesh((2, 4), ("data", "expert"), axis_types=(AxisType.Auto,) * 2)
    rows, groups = PartitionSpec(("data", "expert")), PartitionSpec("expert")

    def of_device(lhs, rhs, sizes):
        return grouped_matmul(lhs, rhs, sizes[0], forced(Backend.MEGABLOX))

    def everything(lhs, rhs, sizes, gradient):
        product = jax.shard_map(of_device, mesh=mesh, in_specs=(rows, groups, rows), out_specs=rows)
        result, pullback = jax.vjp(lambda lhs, rhs: product(lhs, rhs, sizes), lhs, rhs)
        return result, *pullback(gradient)

    lhs, rhs, gradient = arrays(rows=8 * 128, groups=4 * 2, depth=128, width=256)
    traced = jax.jit(everything).trace(lhs, rhs, np.zeros((8, 2), np.int32), gradient)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("@tpu_custom_call") == 3
    assert text.count("stablehlo.all_reduce") == 1  # Of the matrices' gradients, over `data`.


def test_tokamax_results_are_made_exact_where_its_kernels_are_not(monkeypatch):
    pretend(monkeypatch, "gpu", 8.0)
    called = []

    def ragged_dot_general(lhs, rhs, sizes, dimensions, *, preferred_element_type, implementation):
        """Right, but for rows beyond the last group and empty groups, which are NaN."""
        called.append((implementation, preferred_element_type))
        result = jax.lax.ragged_dot_general(lhs, rhs, sizes, dimensions)
        if dimensions.rhs_group_dimensions:
            wrong = (jnp.arange(lhs.shape[0]) >= sizes.sum())[:, None]
        else:
            wrong = (sizes == 0)[:, None, None]
        return jnp.where(wrong, jnp.nan, result)

    fake = types.SimpleNamespace(ragged_dot_general=ragged_dot_general)
    monkeypatch.setitem(sys.modules, "tokamax", fake)
    inputs, sizes = arrays(), jnp.array([3, 0, 11, 0, 7])
    lhs, rhs, gradient = map(jnp.asarray, inputs)
    result, pullback = jax.vjp(lambda *a: grouped_matmul(*a, sizes, GroupedMatmul()), lhs, rhs)
    check((result, *pullback(gradient)), loop(*inputs, sizes), sizes)
    assert called == [("triton", jnp.float32)] * 3


BLOCKS, RAGGED, MEGABLOX = Backend.BLOCKS, Backend.RAGGED_DOT, Backend.MEGABLOX
MOSAIC, TRITON = Backend.TOKAMAX_MOSAIC, Backend.TOKAMAX_TRITON


@pytest.mark.parametrize(
    ("platform", "capability", "available", "dtype", "width", "expected"),
    [
        ("cpu", 0.0, BOTH, jnp.float32, 512, (BLOCKS, BLOCKS, BLOCKS)),
        ("tpu", 0.0, BOTH, jnp.bfloat16, 512, (MEGABLOX, MEGABLOX, MEGABLOX)),
        ("gpu", 9.0, BOTH, jnp.bfloat16, 512, (MOSAIC, MOSAIC, TRITON)),
        ("gpu", 9.0, MOSAIC_ONLY, jnp.bfloat16, 512, (MOSAIC, MOSAIC, MOSAIC)),
        ("gpu", 9.0, BOTH, jnp.float32, 512, (TRITON, TRITON, TRITON)),
        ("gpu", 9.0, BOTH, jnp.bfloat16, 500, (TRITON, TRITON, TRITON)),
        ("gpu", 8.0, BOTH, jnp.bfloat16, 512, (TRITON, TRITON, TRITON)),
        ("gpu", 10.0, BOTH, jnp.bfloat16, 512, (TRITON, TRITON, TRITON)),
        ("gpu", 9.0, MOSAIC_ONLY, jnp.float32, 512, (BLOCKS, BLOCKS, BLOCKS)),
        ("gpu", 9.0, NONE, jnp.bfloat16, 512, (BLOCKS, BLOCKS, BLOCKS)),
        ("gpu", 7.5, BOTH, jnp.bfloat16, 512, (BLOCKS, BLOCKS, BLOCKS)),
    ],
)
def test_automatic_choice(monkeypatch, platform, capability, available, dtype, width, expected):
    pretend(monkeypatch, platform, capability, available)
    lhs = jnp.zeros((64, 256), dtype)
    assert interface._choose(GroupedMatmul(), lhs, width) == expected
    one = interface._choose(GroupedMatmul(lhs_gradient=Backend.REFERENCE), lhs, width)
    assert one == (expected[0], Backend.REFERENCE, expected[2])


def test_the_choice_and_a_slower_path_are_logged_once(monkeypatch, caplog):
    for once in (interface._log_once, interface._warn_of_blocks, interface._warn_of_ragged_dot):
        once.cache_clear()
    lhs, rhs, _ = map(jnp.asarray, arrays())
    with caplog.at_level(logging.INFO, logger=interface.__name__):
        for _ in range(2):
            jax.eval_shape(
                lambda: grouped_matmul(lhs, rhs, jnp.zeros(E, jnp.int32), GroupedMatmul())
            )
        pretend(monkeypatch, "gpu", 9.0, NONE)
        for _ in range(2):
            interface._choose(GroupedMatmul(), lhs, F)
            interface._choose(GroupedMatmul(RAGGED, RAGGED, RAGGED), lhs, F)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 5
    assert "cpu: forward blocks, lhs_gradient blocks, rhs_gradient blocks" in messages[0]
    assert "no kernel of tokamax is installed" in messages[1]
    assert "gpu: forward blocks" in messages[2]
    assert "all rows by all experts" in messages[3]
    assert "gpu: forward ragged_dot" in messages[4]


@pytest.mark.parametrize(
    ("platform", "available", "backends", "named"),
    [
        ("cpu", NONE, GroupedMatmul(forward=MEGABLOX), ["forward is megablox", "tpu", "cpu"]),
        ("tpu", BOTH, GroupedMatmul(rhs_gradient=TRITON), ["rhs_gradient", "gpu", "for tpu"]),
        (
            "gpu",
            MOSAIC_ONLY,
            GroupedMatmul(lhs_gradient=TRITON),
            ["lhs_gradient", "kernels mosaic is"],
        ),
        ("gpu", BOTH, GroupedMatmul(forward=MOSAIC), ["forward", "multiples of 128", "8 and 6"]),
    ],
)
def test_a_backend_that_cannot_run_here_is_named(monkeypatch, platform, available, backends, named):
    pretend(monkeypatch, platform, 9.0, available)
    lhs, rhs, _ = map(jnp.asarray, arrays())
    with pytest.raises(UserError) as error:
        grouped_matmul(lhs, rhs, jnp.zeros(E, jnp.int32), backends)
    message = str(error.value)
    assert all(part in message for part in named), message
    assert message.endswith(".") and "\n" not in message


def test_the_config_is_rebuilt():
    backends = GroupedMatmul(rhs_gradient=Backend.RAGGED_DOT)
    assert decode(encode(backends)) == backends


def test_blocks_of_every_size_hold_every_row_once():
    """Groups that need all steps of the ladder, full blocks and partly filled ones."""
    sizes = np.array([1100, 0, 300, 70, 30, 800, 129], np.int32)
    total = int(sizes.sum()) + 11
    rng = np.random.default_rng(0)
    lhs, gradient = (rng.normal(size=(total, n)).astype(np.float32) for n in (3, 2))
    rhs = rng.normal(size=(len(sizes), 3, 2)).astype(np.float32)
    group = np.repeat(np.arange(len(sizes)), sizes)
    want = np.zeros((total, 2), np.float32)
    want[: len(group)] = np.einsum("rd,rdf->rf", lhs[: len(group)], rhs[group])
    result = jax.jit(blocks.product, static_argnums=3)(lhs, rhs, sizes, False)
    np.testing.assert_allclose(result, want, rtol=1e-5, atol=1e-5)
    ends = np.cumsum(sizes)
    outer = jax.jit(blocks.outer)(lhs, gradient, sizes)
    for e, (end, size) in enumerate(zip(ends, sizes, strict=True)):
        mine = slice(end - size, end)
        np.testing.assert_allclose(outer[e], lhs[mine].T @ gradient[mine], rtol=1e-4, atol=1e-4)
