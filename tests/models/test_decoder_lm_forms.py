"""Forms of attention, positions, norms and embeddings: cached decoding, meshes, counts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.analysis.accounting.decoder_lm import account
from moe_jax.errors import UserError
from moe_jax.layers.attention import MultiHead, Positions, QKNorm
from moe_jax.layers.embedding import EmbeddingScaling
from moe_jax.layers.feed_forward import Activation, FeedForwardForm
from moe_jax.layers.latent_attention import MultiHeadLatent
from moe_jax.layers.mode import Mode
from moe_jax.layers.moe import MoEConfig
from moe_jax.layers.normalization import Norm
from moe_jax.models.abstract_model import AbstractModel
from moe_jax.models.decoder_lm import DecoderLMConfig
from moe_jax.models.stack import Stage, stages_of
from moe_jax.parallel.mesh import MeshConfig, make_mesh
from moe_jax.parallel.sharding import parameter_shardings
from moe_jax.routing.token_choice import TopK

B, L, V = 2, 8, 16
SWIGLU = FeedForwardForm(Activation.SILU, gated=True)
BASE = DecoderLMConfig(
    vocab_size=V, max_length=L, num_layers=2, width=16, num_heads=4, head_width=8, mlp_width=32,
    num_experts=4, moe_at=(1,), feed_forward=SWIGLU, moe=MoEConfig(TopK(k=2), group_size=L, experts=SWIGLU),
    tied=False, embedding_scaling=EmbeddingScaling.NONE,
)  # fmt: skip
FORMS = {
    "grouped_query": MultiHead(kv_heads=2, qkv_bias=True, out_bias=True),
    "head_norm": MultiHead(kv_heads=2, qk_norm=QKNorm.HEAD),
    "full_norm": MultiHead(qk_norm=QKNorm.FULL, qkv_bias=True),
    "relative": MultiHead(positions=Positions.RELATIVE, scaled=False),
    "relative_per_layer": MultiHead(positions=Positions.RELATIVE_PER_LAYER),
    "transformer_xl": MultiHead(positions=Positions.TRANSFORMER_XL),
    "latent": MultiHeadLatent(kv_rank=12, nope_width=8, rotary_width=4, value_width=6),
    "latent_queries": MultiHeadLatent(
        query_rank=10, kv_rank=12, nope_width=8, rotary_width=4, value_width=6
    ),
}


def config_of(name):
    if name == "learned":
        return dataclasses.replace(
            BASE,
            learned_positions=True,
            attention=MultiHead(positions=Positions.NONE),
            norm=Norm.LAYER,
            tied=True,
            embedding_scaling=EmbeddingScaling.LOGITS,
        )
    return dataclasses.replace(BASE, attention=FORMS[name])


NAMES = [*FORMS, "learned"]


@functools.cache
def built(name):
    """The abstract_model, and random numbers for every parameter (biases, too, are not 0)."""
    abstract_model = AbstractModel.of(config_of(name))
    leaves, tree = jax.tree.flatten(abstract_model.shapes)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    values = [0.3 * jax.random.normal(k, s.shape) for k, s in zip(keys, leaves, strict=True)]
    return abstract_model, jax.tree.unflatten(tree, values)


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(1), (B, L), 0, V)


@pytest.mark.parametrize(
    "name",
    [
        # Variations of forms that stay.
        pytest.param(name, marks=pytest.mark.slow)
        if name in ("head_norm", "relative_per_layer", "latent")
        else name
        for name in NAMES
    ],
)
def test_cached_decoding_equals_the_full_forward(name, tokens):
    abstract_model, values = built(name)

    @jax.jit
    def forward(tokens, cache=None):
        logits, _, cache = abstract_model.merge(values)(tokens, None, Mode.DECODE, cache=cache)
        return logits, cache

    full, _ = forward(tokens)
    cache = abstract_model.merge(values).empty_cache(B, L)
    first, cache = forward(tokens[:, :5], cache)
    pieces = [first]
    for t in range(5, L):
        piece, cache = forward(tokens[:, t : t + 1], cache)
        pieces.append(piece)
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), full, rtol=1e-4, atol=1e-4)
    # Later tokens are not seen.
    changed = tokens.at[:, 6].set((tokens[:, 6] + 1) % V)
    np.testing.assert_array_equal(forward(changed)[0][:, :6], full[:, :6])


@pytest.mark.parametrize("name", [*NAMES, "none"])
def test_positions_are_known(name, tokens):
    """To one block without positions the order of earlier tokens is nothing."""
    config = dataclasses.replace(BASE, attention=MultiHead(positions=Positions.NONE))
    config = config if name == "none" else config_of(name)
    config = dataclasses.replace(config, num_layers=1, moe_at=(0,))

    @jax.jit  # Drawn in the same program: one to compile for each form.
    def predict(tokens):
        return config.build(jax.random.key(0))(tokens, None, Mode.DECODE)[0][:, -1]

    difference = np.abs(predict(tokens[:, [1, 0, *range(2, L)]]) - predict(tokens)).max()
    assert (difference > 1e-4) == (name != "none")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("grouped_query", marks=pytest.mark.slow),
        pytest.param("full_norm", marks=pytest.mark.slow),
        "latent_queries",
    ],
)
def test_a_mesh_changes_nothing(name, tokens):
    abstract_model, values = built(name)

    def loss(values):
        logits, _, _ = abstract_model.merge(values)(tokens, None, Mode.EVALUATE)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)
        return -picked.mean()

    plain = jax.jit(jax.value_and_grad(loss))(values)
    mesh = make_mesh(MeshConfig(data=2, expert=1, model=2))
    with jax.set_mesh(mesh):
        shardings = parameter_shardings(abstract_model.shapes, abstract_model.axes, mesh, 1)
        sharded = jax.jit(jax.value_and_grad(loss))(jax.device_put(values, shardings))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), sharded, plain
    )


@pytest.mark.parametrize("name", ["grouped_query", "latent_queries", "transformer_xl"])
def test_counts_are_xlas(name):
    config = dataclasses.replace(
        config_of(name), width=128, num_heads=4, head_width=64, mlp_width=512, expert_width=256,
        max_length=64, vocab_size=256, unroll=True, moe=dataclasses.replace(BASE.moe, group_size=64),
    )  # fmt: skip
    if isinstance(config.attention, MultiHeadLatent):
        config.attention = dataclasses.replace(
            config.attention, query_rank=48, kv_rank=32, nope_width=32, rotary_width=16, value_width=32
        )  # fmt: skip
    abstract_model = AbstractModel.of(config)
    tokens = jax.ShapeDtypeStruct((16, 64), jnp.int32)
    compiled = (
        jax.jit(lambda p, t: abstract_model.merge(p)(t, None, Mode.TRAIN)[:2])
        .lower(abstract_model.shapes, tokens)
        .compile()
    )
    counted = compiled.cost_analysis()["flops"] / (16 * 64)
    # Above: elementwise work, softmax and norms.
    assert 1.0 <= counted / account(config, 64).executed_flops < 1.03


@pytest.mark.parametrize(
    ("experts", "expected"),
    [
        ([0, 8] * 3, [Stage(0, (0, 8), 3)]),
        ([0, 4, 4, 4], [Stage(0, (0,), 1), Stage(1, (4,), 3)]),
        ([0, 0, 0, 4] * 2, [Stage(0, (0, 0, 0, 4), 2)]),
        ([0, 0, 5, 0, 0], [Stage(0, (0,), 2), Stage(2, (5,), 1), Stage(3, (0,), 2)]),
        ([0, 2, 0, 2, 0, 4], [Stage(0, (0, 2), 2), Stage(4, (0, 4), 1)]),
    ],
)
def test_blocks_are_cut_into_the_fewest_periods(experts, expected):
    assert stages_of(experts) == expected
    assert [block for stage in expected for block in stage.moe_blocks] == [
        block for block, num_experts in enumerate(experts) if num_experts
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention": MultiHead(kv_heads=3)}, "kv_heads is 3, which does not divide model.num_heads=4"),
        ({"moe_at": (1, 2)}, r"model.moe_at is \(1, 2\); it must be ascending indices of blocks below"),
        ({"moe_at": (1, 0)}, r"model.moe_at is \(1, 0\); it must be ascending"),
        ({"expert_width": -1}, "model.expert_width is -1; it must be at least 0"),
        ({"attention": MultiHeadLatent(rotary_width=3)}, "rotary_width is 3; rotary positions need an even"),
        ({"attention": MultiHeadLatent(kv_rank=0)}, "kv_rank is 0; it must be at least 1"),
        ({"embedding_scaling": EmbeddingScaling.LOGITS}, "embedding_scaling is logits, but model.tied is false"),
        ({"init_deviation": -0.1}, "init_deviation is -0.1; it must be at least 0"),
    ],
)  # fmt: skip
def test_impossible_forms_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(BASE, **change).validate()
