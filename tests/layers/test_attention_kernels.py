import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.layers import attention_kernels
from moe_jax.layers.attention_kernels import (
    attend,
    in_products,
    in_splash,
    obstacle_to_cudnn,
    obstacle_to_splash,
)
from moe_jax.parallel.mesh import MeshConfig, make_mesh


def arrays(batch, lengths, heads, widths, dtype=jnp.float32):
    """(query, key, value); `lengths`, `heads` and `widths` are pairs."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (
        (batch, lengths[0], heads[0], widths[0]),
        (batch, lengths[1], heads[1], widths[0]),
        (batch, lengths[1], heads[1], widths[1]),
    )
    return [jax.random.normal(k, shape, dtype) for k, shape in zip(keys, shapes, strict=True)]


def by_hand(query, key, value, bias, mask, causal, scale):
    """One query of one head of one row at a time."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    batch, length, heads, width = query.shape
    scale = width**-0.5 if scale is None else scale
    share = heads // key.shape[2]
    scores_shape = (batch, heads, length, key.shape[1])
    bias = np.broadcast_to(0.0 if bias is None else bias, scores_shape)
    mask = np.broadcast_to(True if mask is None else mask, scores_shape)
    result = np.zeros((batch, length, heads, value.shape[-1]))
    for b, i, h in np.ndindex(batch, length, heads):
        scores = scale * key[b, :, h // share] @ query[b, i, h] + bias[b, h, i]
        allowed = mask[b, h, i] & ((np.arange(key.shape[1]) <= i) | (not causal))
        weights = np.where(allowed, np.exp(scores - scores[allowed].max()), 0.0)
        result[b, i, h] = weights / weights.sum() @ value[b, :, h // share]
    return result


@pytest.mark.parametrize(
    ("heads", "widths", "causal", "scale"),
    [
        ((4, 2), (8, 8), True, None),
        ((4, 2), (6, 4), True, None),
        ((2, 2), (4, 6), False, 1.0),
    ],
)
def test_attention_by_hand(heads, widths, causal, scale):
    query, key, value = arrays(2, (5, 7), heads, widths)
    bias = jax.random.normal(jax.random.key(1), (1, heads[0], 5, 7))
    # Key 0 may always be read, so that no query is left without one.
    mask = jax.random.bernoulli(jax.random.key(2), 0.5, (2, 1, 1, 7)).at[..., 0].set(True)
    attention = jax.jit(functools.partial(attend, causal=causal, scale=scale))
    for added in ((None, None), (bias, mask)):
        result = attention(query, key, value, bias=added[0], mask=added[1])
        expected = by_hand(query, key, value, *added, causal, scale)
        np.testing.assert_allclose(result, expected, atol=1e-5)


@settings(deadline=None, max_examples=30)
@given(
    length=st.integers(1, 20),
    kv_heads=st.sampled_from([1, 2, 4]),
    block=st.integers(1, 24),
    causal=st.booleans(),
    with_bias=st.booleans(),
    with_mask=st.sampled_from(["none", "keys", "queries and keys"]),
)
def test_blocks_of_queries_are_attention(length, kv_heads, block, causal, with_bias, with_mask):
    """Values and gradients, whatever the block."""
    query, key, value = arrays(2, (length, length), (4, kv_heads), (6, 6))
    keys = jax.random.split(jax.random.key(1), 3)
    bias = jax.random.normal(keys[0], (1, 4, length, length)) if with_bias else None
    mask = None
    if with_mask != "none":
        rows = 1 if with_mask == "keys" else length
        # Key 0 may always be read, so that no query is left without one.
        mask = jax.random.bernoulli(keys[1], 0.5, (2, 1, rows, length)).at[..., 0].set(True)
    gradient = jax.random.normal(keys[2], query.shape)

    def ours(query, key, value):
        return in_products(query, key, value, bias, mask, causal, 0.4, block)

    def plain(query, key, value):
        return jax.nn.dot_product_attention(
            query, key, value, bias, mask, is_causal=causal, scale=0.4, implementation="xla"
        )

    results = []
    for function in (ours, plain):
        y, pullback = jax.vjp(function, query, key, value)
        results.append((y, *pullback(gradient)))
    for result, expected in zip(*results, strict=True):
        np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)


def test_causal_blocks_leave_out_what_is_not_read():
    """On CPUs: of 4 blocks, 10 of 16 parts of the scores are computed, and [L, M] never exists."""
    query, key, value = arrays(1, (256, 256), (1, 1), (8, 8))
    program = jax.jit(functools.partial(attend, causal=True)).lower(query, key, value).compile()
    text = program.as_text()
    assert "f32[1,1,64,192]" in text
    assert "256,256]" not in text


@pytest.mark.parametrize("widths", [(8, 8), (8, 4)])
def test_queries_without_a_key_stay_finite(widths):
    query, key, value = arrays(2, (4, 4), (2, 2), widths, jnp.bfloat16)
    mask = jnp.array([True, False])[:, None, None, None] & jnp.ones((2, 1, 1, 4), bool)

    def total(query, key, value):
        attended = attend(query, key, value, mask=mask, causal=True)
        assert attended.dtype == jnp.bfloat16
        return attended.astype(jnp.float32).sum()

    step = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))
    value_and_gradients = step(query, key, value)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(value_and_gradients))


def test_splash_attention_is_the_same_on_a_mesh():
    """The kernel's program in Python: heads, key heads and value widths differ, keys are masked."""
    query, key, value = arrays(2, (128, 256), (4, 2), (8, 16))
    mask = jax.random.bernoulli(jax.random.key(2), 0.5, (2, 1, 1, 256)).at[..., 0].set(True)

    def with_gradients(attention):
        def total(query, key, value):
            return (attention(query, key, value) ** 2).sum()

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(query, key, value)

    expected = with_gradients(lambda *qkv: attend(*qkv, mask=mask, causal=True))
    with jax.set_mesh(make_mesh(MeshConfig(data=2, model=2))):
        assert not obstacle_to_splash(query, key, None, mask)
        result = with_gradients(lambda *qkv: in_splash(*qkv, mask, True, 8**-0.5, interpret=True))
    for leaf, other in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("lengths", "heads", "width", "bias", "mask", "word"),
    [
        ((128, 100), (4, 4), 64, None, None, "length is 100"),
        ((128, 128), (4, 4), 12, None, None, "head width is 12"),
        ((128, 128), (4, 4), 64, (1, 4, 128, 128), None, "bias"),
        ((128, 128), (4, 4), 64, None, (2, 1, 128, 128), "mask is (2, 1, 128, 128)"),
        ((128, 128), (4, 1), 64, None, None, "1 key and value heads"),
    ],
)
def test_what_splash_attention_cannot_do(lengths, heads, width, bias, mask, word):
    query, key, _ = jax.eval_shape(lambda: arrays(2, lengths, heads, (width, width)))
    bias = None if bias is None else jax.ShapeDtypeStruct(bias, jnp.float32)
    mask = None if mask is None else jax.ShapeDtypeStruct(mask, bool)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, model=2))):
        assert word in obstacle_to_splash(query, key, bias, mask)


@pytest.mark.parametrize(
    ("lengths", "widths", "dtype", "bias", "mask", "capability", "word"),
    [
        ((7, 7), (64, 64), jnp.bfloat16, None, None, 9.0, ""),
        ((8, 8), (64, 64), jnp.bfloat16, (1, 2, 8, 8), None, 8.0, ""),
        ((7, 8), (64, 64), jnp.bfloat16, (1, 2, 7, 8), None, 9.0, "even lengths"),
        ((8, 8), (64, 64), jnp.bfloat16, (2, 2, 8, 8), None, 9.0, "the bias is"),
        ((8, 8), (64, 64), jnp.bfloat16, None, (2, 1, 1, 8), 9.0, "mask"),
        ((8, 8), (64, 64), jnp.float32, None, None, 9.0, "dtype is float32"),
        ((8, 8), (192, 128), jnp.bfloat16, None, None, 9.0, "head width is 192"),
        ((8, 8), (64, 32), jnp.bfloat16, None, None, 9.0, "values have width 32"),
        ((8, 8), (64, 64), jnp.bfloat16, None, None, 7.5, "capability is 7.5"),
    ],
)
def test_what_cudnn_cannot_do(lengths, widths, dtype, bias, mask, capability, word):
    qkv = jax.eval_shape(lambda: arrays(2, lengths, (2, 2), widths, dtype))
    bias = None if bias is None else jax.ShapeDtypeStruct(bias, dtype)
    mask = None if mask is None else jax.ShapeDtypeStruct(mask, bool)
    obstacle = obstacle_to_cudnn(*qkv, bias, mask, capability)
    assert word in obstacle and bool(word) == bool(obstacle)


def test_what_is_left_to_xla_is_logged_once(monkeypatch, caplog):
    monkeypatch.setattr(attention_kernels, "platform_in_force", lambda: "tpu")
    attention_kernels._log_once.cache_clear()
    query, key, value = arrays(1, (4, 4), (2, 2), (8, 8))
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            jax.eval_shape(attend, query, key, value)
    assert len(caplog.messages) == 1 and "length is 4" in caplog.messages[0]
