import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.decoding.sampling import Sampling, generate, left_padded
from moe_jax.errors import UserError
from moe_jax.layers.mode import Mode
from moe_jax.layers.moe import MoEConfig
from moe_jax.models.abstract_model import AbstractModel
from moe_jax.models.recurrent_lm import RecurrentLMConfig
from moe_jax.routing.noisy_top_k import HierarchicalNoisyTopK, NoisyTopK
from moe_jax.routing.priority import Priority
from moe_jax.routing.token_choice import TopK

B, L, V = 4, 8, 16
SPARSE = RecurrentLMConfig(
    vocab_size=V,
    max_length=L,
    width=8,
    units=12,
    num_experts=4,
    mlp_width=16,
    moe=MoEConfig(NoisyTopK(k=2), group_size=L),
)


@functools.cache
def parameters():
    values = jax.jit(lambda: nnx.to_pure_dict(nnx.state(SPARSE.build(jax.random.key(0)))))()
    # Routers start at 0, and then all tokens go the same way.
    router = values["sigmoid_moe"]["moe"]["router"]
    router["weights"] = jax.random.normal(jax.random.key(1), router["weights"].shape)
    return values


@functools.partial(jax.jit, static_argnames="mode")
def jitted(values, tokens, mask, mode, cache):
    return AbstractModel.of(SPARSE).merge(values)(tokens, mask, mode, cache=cache)


def forward(tokens, mask, mode, cache=None):
    return jitted(parameters(), tokens, mask, mode, cache)


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(2), (B, L), 0, V)


def sigmoid(a):
    return 1 / (1 + np.exp(-np.asarray(a)))


def lstm(values, x):
    """One sequence [L, d] through one layer, step by step."""
    cell, output, outputs = 0.0, np.zeros(values["w_recurrent"].shape[0]), []
    for row in x:
        i, f, g, o = (
            row @ values["w_in"][:, gate] + output @ values["w_recurrent"][:, gate] + bias
            for gate, bias in enumerate(values["bias"])
        )
        cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
        output = (sigmoid(o) * np.tanh(cell)) @ values["projection"]
        outputs.append(output)
    return np.array(outputs)


def test_residuals_are_around_every_layer_and_a_sigmoid_is_on_the_moe(tokens):
    values = jax.tree.map(np.asarray, parameters())
    moe = values["sigmoid_moe"]["moe"]
    logits, _, _ = forward(tokens, None, Mode.DECODE)
    for row, expected in zip(np.asarray(tokens), logits, strict=True):
        x = values["tokens"]["table"][row]
        x = x + lstm(values["lstms"][0], x)
        mixed = np.zeros_like(x)
        for t, token in enumerate(x):
            scores = token @ moe["router"]["weights"]
            best = np.argsort(-scores)[:2]
            gates = np.exp(scores[best]) / np.exp(scores[best]).sum()
            for expert, gate in zip(best, gates, strict=True):
                hidden = np.maximum(token @ moe["w_in"][expert], 0)
                mixed[t] += gate * (hidden @ moe["w_out"][expert])
        x = x + sigmoid(mixed)
        x = x + lstm(values["lstms"][1], x)
        np.testing.assert_allclose(expected, x @ values["tokens"]["output"].T, rtol=1e-4, atol=1e-5)


def test_causality(tokens):
    row, t = 1, 5
    changed = tokens.at[row, t].set((tokens[row, t] + 1) % V)
    before, after = (forward(batch, None, Mode.DECODE)[0] for batch in (tokens, changed))
    np.testing.assert_array_equal(before[:row], after[:row])
    np.testing.assert_array_equal(before[row, :t], after[row, :t])
    assert (before[row, t:] != after[row, t:]).any(axis=-1).all()


def test_a_left_padded_batch_decoded_with_a_cache_equals_each_sequence_alone(tokens):
    lengths = [L, 3, 6, 1]
    sequences = [np.asarray(row[:n]) for row, n in zip(tokens, lengths, strict=True)]
    batch, mask = left_padded(sequences, pad=0)
    cache = AbstractModel.of(SPARSE).merge(parameters()).empty_cache(B, L)
    prompt, _, cache = forward(batch[:, : L - 1], mask[:, : L - 1], Mode.DECODE, cache)
    last, _, cache = forward(batch[:, L - 1 :], mask[:, L - 1 :], Mode.DECODE, cache)
    decoded = np.concatenate([prompt, last], axis=1)
    whole = np.asarray(forward(tokens, None, Mode.DECODE)[0])
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(
            decoded[row, L - length :], whole[row, :length], rtol=1e-5, atol=1e-5
        )
    np.testing.assert_array_equal(cache.lengths, lengths)


def test_generates_greedily_what_the_full_forward_finds_most_probable(tokens):
    prompts = tokens[:, :3]
    model = AbstractModel.of(SPARSE).merge(parameters())
    drawn = jax.jit(
        lambda prompts: generate(
            model, prompts, jnp.ones((B, 3), bool), jax.random.key(0), L - 3, Sampling(0.0)
        )
    )(prompts)
    logits, _, _ = forward(jnp.concatenate([prompts, drawn], axis=1), None, Mode.DECODE)
    np.testing.assert_array_equal(drawn, logits[:, 2:-1].argmax(axis=-1))


@pytest.mark.parametrize("remat", [False, True])
def test_the_moe_is_recomputed_where_asked(remat):
    abstract_model = AbstractModel.of(dataclasses.replace(SPARSE, remat_moe=remat))

    def loss(values):
        logits, _, _ = abstract_model.merge(values)(jnp.zeros((B, L), jnp.int32), None, Mode.TRAIN)
        return jax.nn.logsumexp(logits).mean()

    # jax.checkpoint leaves a primitive of its own in the backward pass.
    assert (" remat" in str(jax.make_jaxpr(jax.grad(loss))(abstract_model.shapes))) == remat


def test_layers_of_the_baselines():
    def names(**fields):
        config = dataclasses.replace(SPARSE, num_experts=0, **fields)
        config.validate()
        return config, AbstractModel.of(config).shapes

    deep, shapes = names(hidden_widths=(5, 6))
    assert [w.shape for w in shapes["dense"]["weights"].values()] == [(8, 5), (5, 6), (6, 8)]
    assert "sigmoid_moe" not in shapes and deep.moe_layers == deep.experts_of_layers == []
    _, shapes = names(num_lstms=4)
    assert len(shapes["lstms"]) == 4 and "dense" not in shapes
    # They run.
    logits, reports, _ = jax.eval_shape(
        lambda: deep.build(jax.random.key(0))(jnp.zeros((B, L), jnp.int32), None, Mode.TRAIN)
    )
    assert logits.shape == (B, L, V) and reports == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"units": 0}, r"model.units is 0; it must be at least 1"),
        ({"num_experts": -1}, r"model.num_experts is -1; it must be at least 0"),
        ({"hidden_widths": (8,)}, r"hidden_widths is \(8,\).*model.num_experts is 4; set it to 0"),
        ({"hidden_widths": (8, 0), "num_experts": 0}, r"\(8, 0\); every width must be at least 1"),
        ({"dropout": 1.0}, r"model.dropout is 1.0; it must be in \[0, 1\)"),
        ({"init_scale": 0.0}, r"model.init_scale is 0.0; it must be above 0"),
        ({"moe": MoEConfig(HierarchicalNoisyTopK(groups=3))}, r"router.groups is 3"),
        ({"moe": MoEConfig(TopK(k=2, order=Priority.CHOICE))}, r"TopK.*would look ahead"),
    ],
)
def test_refusals(fields, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SPARSE, **fields).validate()


def test_too_long_a_sequence_is_refused():
    model = AbstractModel.of(SPARSE).merge(parameters())
    with pytest.raises(UserError, match=r"max_length is 8, but a sequence has 9 tokens"):
        model(jnp.zeros((1, L + 1), jnp.int32), None, Mode.TRAIN)
    with pytest.raises(UserError, match=r"max_length is 8, but a sequence has 9 tokens"):
        model.empty_cache(1, L + 1)
