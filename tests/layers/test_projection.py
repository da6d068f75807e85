import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from moe_jax.layers import positions, projection
from moe_jax.layers.feed_forward import Activation, FeedForward, FeedForwardForm
from moe_jax.layers.projection import project
from moe_jax.parallel.mesh import TOKEN_AXES, make_mesh
from moe_jax.parallel.sharding import partition_spec

sizes = st.lists(st.integers(1, 5), max_size=3)


@settings(deadline=None, max_examples=25)
@given(rows=sizes, inputs=sizes.filter(len), outputs=sizes)
def test_equals_a_tensor_product(rows, inputs, outputs):
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (*rows, *inputs))
    weight = jax.random.normal(keys[1], (*inputs, *outputs))
    y = project(x, weight, contracted=len(inputs))
    expected = np.tensordot(np.float64(x), np.float64(weight), len(inputs))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def _whole_over_data(axes):
    """Mesh axes of dimensions that are split, of `embed` none: weights are gathered before."""
    specs = partition_spec(axes)
    return [None if name == "embed" else spec for name, spec in zip(axes, specs, strict=True)]


@pytest.mark.parametrize("mesh", ["data:2,expert:4", "data:2,expert:2,model:2", "model:4"])
@pytest.mark.parametrize(
    ("shape", "axes", "contracted"),
    [
        ((16, 3, 4, 2), ("embed", "qkv", "heads", "head"), 1),
        ((16, 32), ("embed", "mlp"), 1),
        ((4, 4, 16), ("heads", "head", "embed"), 2),
    ],
)
def test_is_the_same_on_a_mesh_and_moves_no_activations(mesh, shape, axes, contracted):
    """What is exchanged are the sums over `model` and the gathered weights."""
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (8, 6, *shape[:contracted]))
    weight = jax.random.normal(keys[1], shape)
    expected = jnp.tensordot(x, weight, contracted)
    with jax.set_mesh(make_mesh(mesh)):
        of_x = PartitionSpec(TOKEN_AXES, None, *_whole_over_data(axes[:contracted]))
        of_weight = PartitionSpec(*_whole_over_data(axes))
        of_y = PartitionSpec(TOKEN_AXES, None, *of_weight[contracted:])
        program = jax.jit(
            lambda x, weight: project(x, weight, contracted),
            in_shardings=(of_x, of_weight), out_shardings=of_y,
        )  # fmt: skip
        text = program.lower(x, weight).compile().as_text()
        np.testing.assert_allclose(program(x, weight), expected, rtol=1e-5, atol=1e-5)
    assert not re.search(r"all-gather|all-to-all|collective-permute", text)
    sums = len(re.findall(r" all-reduce(?:-start)?\(", text))
    assert sums == (axes[0] == "heads" and "model" in mesh)


def test_no_activation_is_transposed_in_memory():
    """XLA's CPU backend would, for the weights' gradients of products of [B, L, d]."""
    layer = FeedForward(
        16, 24, FeedForwardForm(Activation.SILU, gated=True), 0.0, 1.0, jax.random.key(0)
    )
    x = jnp.ones((4, 32, 16))
    program = jax.jit(jax.grad(lambda layer, x: layer(x, None).sum(), argnums=(0, 1)))
    text = program.lower(layer, x).compile().as_text()
    assert "f32[128,24]" in text
    assert not re.search(r"f32\[(16|24),128\]", text)


def test_the_result_may_be_wider():
    x, weight = jnp.ones((2, 3, 4), jnp.bfloat16), jnp.ones((4, 5))
    assert project(x, weight).dtype == jnp.bfloat16
    assert project(x, weight, dtype=jnp.float32).dtype == jnp.float32


@pytest.mark.parametrize("width", [2, 6])
def test_other_platforms_compute_the_same(monkeypatch, width):
    """Products and rotations have a form for XLA's CPU backend."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, 3, 4, width))
    weight = jax.random.normal(keys[1], (4, width, 5, 2))
    place = jnp.arange(6).reshape(2, 3)
    results = []
    for platform in ("cpu", "tpu"):
        monkeypatch.setattr(projection, "platform_in_force", lambda platform=platform: platform)
        monkeypatch.setattr(positions, "platform_in_force", lambda platform=platform: platform)
        of_product = jax.value_and_grad(lambda x, w: (project(x, w, 2) ** 2).sum(), argnums=(0, 1))
        of_rotation = jax.value_and_grad(lambda x: (positions.rotate(x, place) * x**2).sum())
        results.append((of_product(x, weight), of_rotation(x)))
    for one, other in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
