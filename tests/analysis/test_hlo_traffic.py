"""TrafficBytes to and from main memory: by hand, and beside XLA's own count where that is right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.analysis.hlo import Program, TrafficBytes


@pytest.fixture(autouse=True)
def optimized():
    """Programs as they are outside of tests: with fusions."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


def moved(body: str, rest: str = "") -> TrafficBytes:
    lines = "\n".join(f"  {line}" for line in body.strip().splitlines())
    text = f"HloModule jit_f\n{rest}\nENTRY %main (p: f32[8]) -> f32[8] {{\n{lines}\n}}\n"
    return Program(text).memory_bytes()


def test_what_names_memory_moves_nothing():
    assert moved(
        """
%p = (f32[8]{0}, f32[8]{0}) parameter(0)
%x = f32[8]{0} get-tuple-element(%p), index=0
%y = f32[2,4]{1,0} bitcast(%x)
%c = f32[8]{0} constant({...})
%new = f32[8]{0} custom-call(), custom_call_target="AllocateBuffer"
ROOT %out = (f32[2,4]{1,0}, f32[8]{0}, f32[8]{0}) tuple(%y, %c, %new)
"""
    ) == TrafficBytes(0, exact=True)


def test_what_lies_in_the_cores_memory_is_paid_when_it_comes_and_goes():
    # 4,096 bytes come, 1,024 of them as a slice, and 4,096 go; what is computed in between is free.
    # The S(2) of a semaphore is no traffic either.
    assert moved(
        """
%p = f32[1024]{0:T(1024)} parameter(0)
%start = (f32[1024]{0:T(1024)S(1)}, f32[1024]{0:T(1024)}, u32[]{:S(2)}) copy-start(%p)
%done = f32[1024]{0:T(1024)S(1)} copy-done(%start)
%part = ((f32[1024]{0:T(1024)}), f32[256]{0:T(256)S(1)}, s32[]{:S(2)}) slice-start(%p), slice={[0:256]}
%parts = f32[256]{0:T(256)S(1)} slice-done(%part)
%sum = f32[1024]{0:T(1024)S(1)} add(%done, %done)
ROOT %out = f32[1024]{0:T(1024)} copy(%sum)
"""
    ) == TrafficBytes(4096 + 1024 + 4096, exact=True)


FUSED = """
%take (table: f32[100,16], row: s32[]) -> f32[1,16] {
  %table = f32[100,16]{1,0} parameter(0)
  %row = s32[] parameter(1)
  %zero = s32[] constant(0)
  %exact = f32[100,16]{1,0} convert(%table)
  %slice = f32[1,16]{1,0} dynamic-slice(%exact, %row, %zero), dynamic_slice_sizes={1,16}
  ROOT %twice = f32[1,16]{1,0} add(%slice, %slice)
}
%put (new: f32[1,16], stack: f32[100,16], row: s32[]) -> f32[1600] {
  %new = f32[1,16]{1,0} parameter(0)
  %stack = f32[100,16]{1,0} parameter(1)
  %at = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  %put.1 = f32[100,16]{1,0} dynamic-update-slice(%stack, %new, %at, %zero.1)
  ROOT %flat = f32[1600]{0} bitcast(%put.1)
}
%fill (new: f32[1,16], row: s32[]) -> f32[100,16] {
  %new.2 = f32[1,16]{1,0} parameter(0)
  %at.2 = s32[] parameter(1)
  %zero.2 = f32[] constant(0)
  %zeros = f32[100,16]{1,0} broadcast(%zero.2), dimensions={}
  ROOT %put.2 = f32[100,16]{1,0} dynamic-update-slice(%zeros, %new.2, %at.2, %at.2)
}
%outer (table: f32[100,16], row: s32[]) -> f32[1,16] {
  %row.3 = s32[] parameter(1)
  %table.3 = f32[100,16]{1,0} parameter(0)
  %inner = f32[1,16]{1,0} fusion(%table.3, %row.3), kind=kLoop, calls=%take
  ROOT %negated = f32[1,16]{1,0} negate(%inner)
}
"""


@pytest.mark.parametrize(
    ("line", "count"),
    [
        # A row of 64 bytes is read of the table, the index of 4, and a row is written.
        ("f32[1,16]{1,0} fusion(%t, %i), kind=kLoop, calls=%take", 64 + 4 + 64),
        ("f32[1,16]{1,0} fusion(%t, %i), kind=kLoop, calls=%outer", 64 + 4 + 64),
        ("f32[1,16]{1,0} dynamic-slice(%t, %i, %i), dynamic_slice_sizes={1,16}", 64 + 8 + 64),
        # In place: the row is read and written.
        ("f32[1600]{0} fusion(%r, %t, %i), kind=kLoop, calls=%put", 64 + 4 + 64),
        ("f32[100,16]{1,0} dynamic-update-slice(%t, %r, %i, %i)", 64 + 8 + 64),
        # Into an array that the fusion makes itself: all of it is written.
        ("f32[100,16]{1,0} fusion(%r, %i), kind=kLoop, calls=%fill", 64 + 4 + 6400),
        # 3 rows by their indices.
        ("f32[3,16]{1,0} gather(%t, %n), slice_sizes={1,16}", 192 + 12 + 192),
        ("f32[100,16]{1,0} scatter(%t, %n, %u), to_apply=%add", 12 + 192 + 192),
        ("f32[100,16]{1,0} negate(%t)", 2 * 6400),
        ("f32[400,16]{1,0} all-gather(%t), replica_groups=[1,4]<=[4]", 6400 + 4 * 6400),
        # What is sent is read and what is received is written, both 6,400 bytes.
        ("(f32[100,16]{1,0}, u32[], token[]) send(%t, %a), channel_id=1", 6400),
        ("(f32[100,16]{1,0}, u32[], token[]) recv(%a), channel_id=1", 6400),
        # A kernel by its own estimate, or by what it is given and gives.
        (
            'f32[1,16]{1,0} custom-call(%t), custom_call_target="tpu_custom_call", backend_config='
            '{"cost_estimate":{"flops":"7","transcendentals":"0","bytes_accessed":"12800"}}',
            12800,
        ),
        ('f32[1,16]{1,0} custom-call(%t), custom_call_target="tpu_custom_call"', 6400 + 64),
    ],
)
def test_what_an_instruction_moves(line, count):
    given_ = """
%t = f32[100,16]{1,0} parameter(0)
%r = f32[1,16]{1,0} parameter(1)
%i = s32[] parameter(2)
%n = s32[3]{0} parameter(3)
%u = f32[3,16]{1,0} parameter(4)
%a = token[] after-all()
"""
    assert moved(f"{given_}ROOT %out = {line}", FUSED) == TrafficBytes(count, exact=True)


def test_a_loop_of_unknown_length_is_said_to_be_inexact():
    def doubled(x):
        return jax.lax.while_loop(lambda x: x[0] < 100, lambda x: 2 * x, x)

    text = jax.jit(doubled).lower(np.ones(8, np.float32)).compile().as_text()
    assert not Program(text).memory_bytes().exact


def compiled(function, *arguments, donate=()):
    return jax.jit(function, donate_argnums=donate).lower(*arguments).compile()


@settings(max_examples=5, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 300))
def test_a_product_and_a_nonlinearity_move_what_xla_counts(rows, depth, columns):
    function = compiled(
        lambda x, w: jnp.tanh(x @ w), np.ones((rows, depth)), np.ones((depth, columns))
    )
    counted = function.cost_analysis()["bytes accessed"]
    assert Program(function.as_text()).memory_bytes().count == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize("name", ["softmax", "gradient", "update"])
def test_programs_without_loops_move_what_xla_counts(name):
    def loss(x, w, v):
        return jnp.sum(jax.nn.gelu(x @ w) @ v)

    x, w, v = np.ones((512, 64)), np.ones((64, 256)), np.ones((256, 64))
    function = {
        "softmax": lambda: compiled(jax.nn.softmax, x),
        "gradient": lambda: compiled(jax.grad(loss, argnums=(0, 1, 2)), x, w, v),
        "update": lambda: compiled(
            lambda x, row, at: jax.lax.dynamic_update_slice(x, 2 * row, (at, 0)),
            *(x, x[:1], np.int32(3)),
            donate=0,
        ),
    }[name]()
    counted = function.cost_analysis()["bytes accessed"]
    assert Program(function.as_text()).memory_bytes().count == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize("stacked", [False, True])
def test_each_trip_of_a_scan_takes_its_own_slice_of_the_stacks(stacked):
    """Not the whole stack, and not the body once, as XLA counts."""

    def scanned(x, ws):
        return jax.lax.scan(lambda x, w: (jax.nn.relu(x @ w), x if stacked else None), x, ws)

    def count(length):
        arguments = np.ones((256, 64), np.float32), np.ones((length, 64, 64), np.float32)
        found = Program(compiled(scanned, *arguments).as_text()).memory_bytes()
        assert found.exact
        return found.count

    matrix, rows = 4 * 64 * 64, 4 * 256 * 64
    # The slice is copied (2 matrices); the product reads and writes, and so does the relu. Where x is
    # stacked, it is written into its place, and the carried x is copied, because both are kept.
    trip = 3 * matrix + 2 * rows + 2 * rows + (4 * rows if stacked else 0)
    # The stack of results begins as zeros that are written once.
    once = rows if stacked else 0
    # Counters and indices take some bytes.
    assert (count(19) - count(4)) / 15 == pytest.approx(trip + once, rel=0.01)
