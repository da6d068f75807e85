import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.decoding.sampling import left_padded
from moe_jax.errors import UserError
from moe_jax.layers.mode import Mode
from moe_jax.layers.moe import MoEConfig
from moe_jax.models.abstract_model import AbstractModel
from moe_jax.models.decoder_lm import DecoderLMConfig
from moe_jax.models.stack import ComputeDtype, Remat
from moe_jax.parallel.mesh import TOKEN_AXES, MeshConfig, make_mesh
from moe_jax.parallel.sharding import parameter_shardings
from moe_jax.routing.capacity import Capacity
from moe_jax.routing.losses import Losses
from moe_jax.routing.scores import Exploration
from moe_jax.routing.token_choice import GShard, TopK

B, L, V = 4, 16, 32
ROUTER = TopK(k=2, losses=Losses(load_balancing=1e-2, router_z=1e-3))
SPARSE = DecoderLMConfig(
    vocab_size=V,
    max_length=L,
    num_layers=4,
    width=16,
    num_heads=2,
    head_width=8,
    mlp_width=32,
    num_experts=4,
    moe_every=2,
    moe=MoEConfig(ROUTER, Capacity(1.0, 2.0), group_size=L),
)
DENSE = dataclasses.replace(SPARSE, moe_every=0, num_layers=2)
# As in training: jitter, dropout and expert dropout are on.
NOISY = dataclasses.replace(
    SPARSE,
    dropout=0.2,
    moe=MoEConfig(
        TopK(k=2, exploration=Exploration.JITTER, exploration_rate=0.1, losses=ROUTER.losses),
        SPARSE.moe.capacity,
        group_size=8,
        expert_dropout=0.2,
    ),
)


@functools.cache
def abstract_model(name):
    return AbstractModel.of({"sparse": SPARSE, "dense": DENSE}[name])


@functools.cache
def parameters(name):
    config = {"sparse": SPARSE, "dense": DENSE}[name]
    values = jax.jit(lambda: nnx.to_pure_dict(nnx.state(config.build(jax.random.key(0)))))()
    if name == "sparse":  # Larger than at the start, so that the routers decide.
        router = values["stack"]["stages"][0]["blocks"][1]["mlp"]["router"]
        router["weights"] = 25 * router["weights"]
    return values


@functools.partial(jax.jit, static_argnames=("name", "mode"))
def forward(name, values, tokens, mask, mode, cache=None):
    return abstract_model(name).merge(values)(tokens, mask, mode, cache=cache)


def logits_of(name, tokens, mode, mask=None):
    return np.asarray(forward(name, parameters(name), tokens, mask, mode)[0])


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(1), (B, L), 0, V)


@pytest.mark.parametrize("mode", [Mode.TRAIN, Mode.EVALUATE, Mode.DECODE])
def test_causality(tokens, mode):
    row, t = 1, 9
    changed = tokens.at[row, t].set((tokens[row, t] + 1) % V)
    before, after = logits_of("sparse", tokens, mode), logits_of("sparse", changed, mode)
    np.testing.assert_array_equal(before[:row], after[:row])
    np.testing.assert_array_equal(before[row, :t], after[row, :t])
    assert (before[row, t] != after[row, t]).any()
    dropped = forward("sparse", parameters("sparse"), tokens, None, mode)[1][0].statistics[
        "dropped"
    ]
    assert (dropped > 0).all() == (mode == Mode.TRAIN)


def continued(name, tokens, mask, prompt):
    """Logits of one prefill of `prompt` tokens and one call for each of the rest."""
    values = parameters(name)
    cache = abstract_model(name).merge(values).empty_cache(*tokens.shape)
    pieces, start = [], 0
    for stop in range(prompt, tokens.shape[1] + 1):
        piece = tokens[:, start:stop]
        logits, _, cache = forward(name, values, piece, mask[:, start:stop], Mode.DECODE, cache)
        pieces.append(logits)
        start = stop
    return np.concatenate(pieces, axis=1)


@pytest.mark.parametrize("name", ["sparse", "dense"])
def test_cached_logits_equal_the_full_forward(name, tokens):
    cached = continued(name, tokens, jnp.ones((B, L), bool), prompt=11)
    np.testing.assert_allclose(cached, logits_of(name, tokens, Mode.DECODE), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["sparse", "dense"])
def test_a_left_padded_batch_equals_each_sequence_alone(name, tokens):
    lengths = [L, 5, 12, 1]
    sequences = [np.asarray(row[:n]) for row, n in zip(tokens, lengths, strict=True)]
    # The last position is decoded with the cache, the rest is the padded prompt.
    batch, mask = left_padded(sequences, pad=0)
    cached = continued(name, jnp.array(batch), jnp.array(mask), prompt=L - 1)
    # Causal, and nothing is dropped: what follows a sequence does not matter.
    alone = logits_of(name, tokens, Mode.DECODE)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(
            cached[row, L - length :], alone[row, :length], rtol=1e-5, atol=1e-5
        )


def test_padding_contents_change_nothing(tokens):
    mask = jnp.arange(L) < jnp.array([[L], [9], [4], [L]])
    noise = jnp.where(mask, tokens, (tokens + 7) % V)
    plain, noisy = (logits_of("sparse", t, Mode.TRAIN, mask) for t in (tokens, noise))
    np.testing.assert_array_equal(plain[np.asarray(mask)], noisy[np.asarray(mask)])


def loss_and_gradients(tokens, shape=(1, 1, 1), **changes):
    """Of NOISY with `changes`, on a mesh of `shape`."""
    model = AbstractModel.of(dataclasses.replace(NOISY, **changes))

    @jax.jit
    @jax.value_and_grad
    def run(values, tokens):
        logits, (report,), _ = model.merge(values)(tokens, None, Mode.TRAIN, jax.random.key(3))
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)
        return -picked.mean() + 0.01 * report.losses["load_balancing"].sum()

    mesh = make_mesh(MeshConfig(*shape))
    shardings = parameter_shardings(model.shapes, model.axes, mesh, fsdp_min_size=0)
    with jax.set_mesh(mesh):
        values = jax.device_put(parameters("sparse"), shardings)
        rows = jax.device_put(tokens, NamedSharding(mesh, PartitionSpec(TOKEN_AXES)))
        return jax.device_get(run(values, rows))


@pytest.fixture(scope="module")
def plain(tokens):
    return loss_and_gradients(tokens)


@pytest.mark.parametrize(
    "changes", [{"remat": Remat.DOTS}, {"remat": Remat.FULL, "unroll": True}], ids=str
)
def test_remat_and_unroll_change_nothing(tokens, plain, changes):
    loss, gradients = loss_and_gradients(tokens, **changes)
    assert loss == pytest.approx(plain[0], rel=1e-6)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), gradients, plain[1]
    )


def test_every_expert_and_router_weight_learns(plain):
    moe = plain[1]["stack"]["stages"][0]["blocks"][1]["mlp"]
    periods, experts = SPARSE.stages[0].count, SPARSE.num_experts
    for name in ("w_in", "w_out"):
        assert moe[name].shape[:2] == (periods, experts)
        assert (np.abs(moe[name]).max(axis=(2, 3)) > 0).all(), name
    assert (moe["router"]["weights"] != 0).all()
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(plain[1]))


def test_bfloat16_keeps_parameters_and_logits_in_float32(tokens):
    config = dataclasses.replace(SPARSE, dtype=ComputeDtype.BFLOAT16)
    model = AbstractModel.of(config)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.shapes)} == {jnp.dtype(jnp.float32)}

    @jax.jit
    def run(values, tokens):
        merged = model.merge(values)
        cache = merged.empty_cache(B, L)
        return merged(tokens, None, Mode.DECODE, cache=cache)

    logits, (report,), cache = run(parameters("sparse"), tokens)
    assert logits.dtype == report.losses["router_z"].dtype == jnp.float32
    assert cache.trunk[0][0].attention.keys.dtype == jnp.bfloat16
    np.testing.assert_allclose(logits, logits_of("sparse", tokens, Mode.DECODE), atol=0.5)


def test_sharded_training_with_dropout_equals_one_device(tokens, plain):
    loss, gradients = plain
    sharded_loss, sharded_gradients = loss_and_gradients(tokens, (2, 2, 2))
    assert sharded_loss == pytest.approx(loss, rel=1e-5)
    for (path, got), want in zip(
        jax.tree.leaves_with_path(sharded_gradients), jax.tree.leaves(gradients), strict=True
    ):
        error = np.linalg.norm(got - want) / np.linalg.norm(want)
        assert error < 1e-5, jax.tree_util.keystr(path)


def test_a_sequence_longer_than_the_positions_is_an_error():
    too_long = jnp.zeros((1, L + 1), jnp.int32)
    model = abstract_model("dense").merge(
        abstract_model("dense").shapes
    )  # Refused before any number.
    with pytest.raises(UserError, match=r"model.max_length is 16, but a sequence has 17 tokens"):
        model(too_long, None, Mode.EVALUATE)
    with pytest.raises(UserError, match=r"model.max_length is 16, but a sequence has 20 tokens"):
        model(too_long[:, :1], None, Mode.DECODE, cache=model.empty_cache(1, 20))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 0}, "model.width is 0; it must be at least 1"),
        ({"num_heads": -1}, "model.num_heads is -1; it must be at least 1"),
        ({"mlp_width": 0}, "model.mlp_width is 0; it must be at least 1"),
        ({"head_width": 7}, "model.head_width is 7; rotary positions need an even width"),
        ({"num_layers": 3}, "model.moe_every is 2, which does not divide model.num_layers=3"),
        ({"moe_every": -1}, "model.moe_every is -1"),
        ({"dropout": 1.0}, r"model.dropout is 1.0; it must be in \[0, 1\)"),
        ({"num_experts": 1}, "router.k is 2 but there are 1 experts"),
        ({"moe": MoEConfig(GShard())}, "router is GShard.*look ahead: a token's second choice is"),
        ({"experts_by_layer": (4,)}, "experts_by_layer has 1 entries, but 2 blocks have a MoE"),
    ],
)
def test_bad_fields_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SPARSE, **changes).validate()


def test_moe_layers_are_the_last_of_each_period():
    assert SPARSE.moe_layers == [1, 3]
    assert DENSE.moe_layers == []
    assert dataclasses.replace(SPARSE, moe_every=1).moe_layers == [0, 1, 2, 3]


def test_definition_names_every_dimension():
    shapes, axes = abstract_model("sparse").shapes, abstract_model("sparse").axes
    jax.tree.map(
        lambda leaf, names: len(names) == leaf.ndim or pytest.fail(str(names)), shapes, axes
    )
    moe = axes["stack"]["stages"][0]["blocks"][1]["mlp"]
    assert moe["w_in"] == ("layers", "experts", "expert_embed", "mlp")
    assert axes["tokens"]["table"] == ("vocabulary", "embed")
