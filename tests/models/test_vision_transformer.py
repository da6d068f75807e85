"""The Vision Transformer against plain definitions."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.errors import UserError
from moe_jax.layers.mode import Mode
from moe_jax.layers.moe import MoEConfig
from moe_jax.models.abstract_model import AbstractModel
from moe_jax.models.vision import (
    Interpolation,
    PatchEmbedding,
    Pooling,
    VisionConfig,
    resized,
    resized_positions,
)
from moe_jax.routing.capacity import Capacity
from moe_jax.routing.fixed import HashRouter
from moe_jax.routing.token_choice import VMoE

TINY = VisionConfig(
    num_layers=2, width=8, num_heads=2, head_width=4, mlp_width=16, num_experts=2, image_size=8,
    patch_size=4, channels=2, num_classes=3, pre_logits=True, head_bias=-1.0, unroll=True,
    moe=dataclasses.replace(VisionConfig().moe, group_size=10),
)  # fmt: skip


def images(count, size=8):
    return jax.random.normal(jax.random.key(1), (count, size, size, 2))


def drawn(abstract_model):
    """Numbers without a compilation, the head's matrix not 0 as it is at the start."""
    random = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: random.normal(scale=0.3, size=leaf.shape).astype(np.float32),
        abstract_model.shapes,
    )


def forward(abstract_model):
    """The jitted model: (parameters, images, mask) -> (logits, reports)."""
    return jax.jit(lambda p, x, mask: abstract_model.merge(p)(x, mask, Mode.EVALUATE))


def test_patches_are_a_strided_convolution():
    embedding = PatchEmbedding(4, 2, 8, 1.0, jax.random.key(0))
    embedding.bias[...] = jnp.arange(8.0)
    x = images(3, 12)
    convolved = jax.lax.conv_general_dilated(
        x, embedding.kernel[...], (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    expected = convolved.reshape(3, 9, 8) + jnp.arange(8.0)
    np.testing.assert_allclose(embedding(x), expected, rtol=1e-5, atol=1e-5)


def test_the_head_starts_at_its_bias():
    def start():
        model = TINY.build(jax.random.key(0))
        return model.head.kernel[...], model.head.bias[...], model.class_token[...]

    kernel, bias, class_token = jax.jit(start)()
    assert not kernel.any() and not class_token.any()
    np.testing.assert_array_equal(bias, np.full(3, -1.0))


@pytest.mark.parametrize("pooling", Pooling)
def test_what_is_classified(pooling):
    """Head and pre-logits layer of the pooled vector; GAP has no class token."""
    config = dataclasses.replace(TINY, pooling=pooling, moe_every=0)
    assert config.num_tokens == (5 if pooling == Pooling.TOKEN else 4)
    abstract_model = AbstractModel.of(config)
    parameters = drawn(abstract_model)
    assert ("class_token" in parameters) == (pooling == Pooling.TOKEN)

    def normed_and_logits(parameters, x):
        model, normed = abstract_model.merge(parameters), []
        norm = model.norm
        model.norm = lambda x: normed.append(norm(x)) or normed[0]
        return normed, model(x, None, Mode.EVALUATE)[0]

    (x,), logits = jax.jit(normed_and_logits)(parameters, images(2))
    assert x.shape == (2, config.num_tokens, 8)
    pooled = x[:, 0] if pooling == Pooling.TOKEN else x.mean(axis=1)
    weights = parameters["pre_logits"]
    hidden = jnp.tanh(pooled @ weights["kernel"] + weights["bias"])
    expected = hidden @ parameters["head"]["kernel"] + parameters["head"]["bias"]
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_filling_images_take_no_slot():
    """They stand before the real image in its group, and would take all 8 slots."""
    router = VMoE(k=1, noise=0.0, load_weight=0.0)
    moe = MoEConfig(router, Capacity(0.5, 0.5), group_size=15, experts=TINY.feed_forward)
    config = dataclasses.replace(TINY, num_experts=1, moe=moe)
    abstract_model = AbstractModel.of(config)
    model = functools.partial(forward(abstract_model), drawn(abstract_model))
    x, mask = images(3), jnp.array([False, False, True])
    padded, reports = model(x, mask)
    assert [report.statistics["load"].shape for report in reports] == [(1, 1)]
    other, _ = model(x.at[:2].add(1.0), mask)
    np.testing.assert_array_equal(padded[2], other[2])
    unmasked, _ = model(x, jnp.ones(3, bool))
    assert np.abs(unmasked[2] - padded[2]).max() > 1e-3


def test_other_sizes_are_refused():
    abstract_model = AbstractModel.of(TINY)
    with pytest.raises(UserError, match=r"image_size is 8 .* the images are \(12, 12, 2\)"):
        jax.eval_shape(forward(abstract_model), abstract_model.shapes, images(1, 12), None)
    for field, value, words in (
        ("patch_size", 3, "patch_size is 3, which does not divide model.image_size=8"),
        ("num_classes", 0, "num_classes is 0; it must be at least 1"),
        ("moe", MoEConfig(HashRouter(vocab_size=8)), "HashRouter, .* patches have none"),
    ):
        with pytest.raises(UserError, match=words):
            dataclasses.replace(TINY, **{field: value}).validate()


@pytest.mark.parametrize("interpolation", Interpolation)
def test_interpolated_positions(interpolation):
    """A plane stays a plane inside, the class token and the size of equal grids stay as they are."""
    rows, columns = jnp.meshgrid(jnp.arange(4.0), jnp.arange(4.0), indexing="ij")
    table = jnp.stack([rows, columns], axis=-1).reshape(16, 2)
    with_token = jnp.concatenate([jnp.array([[7.0, -7.0]]), table])
    np.testing.assert_allclose(resized_positions(with_token, 4, 4, interpolation), with_token)
    larger = resized_positions(with_token, 4, 8, interpolation)
    assert larger.shape == (65, 2)
    np.testing.assert_array_equal(larger[0], with_token[0])
    # Patch i of 8 has its center at (i + 0.5) / 2 - 0.5 of the old grid.
    centers = (np.arange(8) + 0.5) / 2 - 0.5
    inside = larger[1:].reshape(8, 8, 2)[3:5, 3:5]
    np.testing.assert_allclose(inside[:, :, 0], centers[3:5, None] * np.ones(2), atol=1e-6)
    np.testing.assert_allclose(inside[:, :, 1], centers[None, 3:5] * np.ones((2, 1)), atol=1e-6)


def test_a_trained_model_takes_larger_images():
    """A constant image looks the same at twice the size if all positions are equal."""
    config = dataclasses.replace(TINY, moe_every=0, pooling=Pooling.GAP)
    abstract_model = AbstractModel.of(config)
    parameters = drawn(abstract_model)
    table = parameters["positions"]["table"]
    parameters["positions"]["table"] = np.broadcast_to(table[0], table.shape)
    new, larger = resized(config, parameters, 16)
    assert new.num_tokens == 16 and larger["positions"]["table"].shape == (16, 8)
    ones = jnp.ones((1, 16, 16, 2))
    expected, _ = forward(abstract_model)(parameters, ones[:, :8, :8], None)
    found, _ = forward(AbstractModel.of(new))(larger, ones, None)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_groups_keep_their_number_of_images():
    parameters = {"positions": {"table": jnp.zeros((5, 8))}}
    new, _ = resized(TINY, parameters, 16)
    assert (TINY.moe.group_size, new.moe.group_size) == (2 * 5, 2 * 17)
    odd = dataclasses.replace(TINY, moe=dataclasses.replace(TINY.moe, group_size=6))
    with pytest.raises(UserError, match="group_size is 6, no multiple of the 5 tokens"):
        resized(odd, parameters, 16)
