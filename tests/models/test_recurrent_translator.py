import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.errors import UserError
from moe_jax.layers.mode import Mode
from moe_jax.layers.moe import MoEConfig
from moe_jax.models.abstract_model import AbstractModel
from moe_jax.models.recurrent_translator import AttentiveLSTM, RecurrentTranslatorConfig
from moe_jax.routing.expert_choice import ExpertChoice
from moe_jax.routing.noisy_top_k import NoisyTopK

B, M, L, V, D = 3, 6, 4, 12, 8
CONFIG = RecurrentTranslatorConfig(
    vocab_size=V,
    width=D,
    units=10,
    attention_width=5,
    num_experts=4,
    mlp_width=16,
    moe=MoEConfig(NoisyTopK(k=2, importance_weight=0.01, load_weight=0.01), group_size=2),
)


@functools.cache
def parameters():
    return jax.jit(lambda: nnx.to_pure_dict(nnx.state(CONFIG.build(jax.random.key(0)))))()


def model(values):
    return AbstractModel.of(CONFIG).merge(values)


@jax.jit
def jitted_encode(values, inputs, mask):
    return model(values).encode(inputs, mask, Mode.DECODE)[0]


@jax.jit
def jitted_decode(values, memory, mask, targets, cache):
    logits, _, cache = model(values).decode(memory, mask, targets, None, Mode.DECODE, cache=cache)
    return logits, cache


def encode(inputs, mask=None):
    return jitted_encode(parameters(), inputs, mask)


def decode(memory, mask, targets, cache=None):
    return jitted_decode(parameters(), memory, mask, targets, cache)


@pytest.fixture(scope="module")
def inputs():
    return jax.random.randint(jax.random.key(1), (B, M), 1, V)


@pytest.fixture(scope="module")
def targets():
    return jax.random.randint(jax.random.key(2), (B, L), 1, V)


@pytest.fixture(scope="module")
def memory(inputs):
    return encode(inputs)


@pytest.fixture(scope="module")
def logits(memory, targets):
    return decode(memory, None, targets)[0]


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def test_attention_reads_what_the_last_output_asks_for():
    module = AttentiveLSTM(CONFIG, jax.random.key(3))
    x, memory = (jax.random.normal(jax.random.key(k), (B, n, D)) for k, n in ((4, L), (5, M)))
    memory_mask = np.arange(M) < np.array([[6], [2], [1]])
    y, _ = jax.jit(
        lambda x, memory: module(
            x, jnp.ones((B, L), bool), module.memory(memory), memory_mask, None
        )
    )(x, memory)
    lstm = module.lstm
    w_in, w_recurrent, bias, projection, w_context, u, w, v = (
        np.asarray(p[...])
        for p in (
            lstm.w_in, lstm.w_recurrent, lstm.bias, lstm.projection,
            module.w_context, module.w_memory, module.w_output, module.scores,
        )
    )  # fmt: skip
    for row in range(B):
        cell, output = np.zeros(10), np.zeros(D)
        source = np.asarray(memory)[row, memory_mask[row]]
        for t in range(L):
            scores = [(v * np.tanh(m @ u) * np.tanh(output @ w)).sum() for m in source]
            weights = np.exp(scores) / np.exp(scores).sum()
            context = weights @ source
            i, f, g, o = (
                np.asarray(x)[row, t] @ w_in[:, gate]
                + output @ w_recurrent[:, gate]
                + context @ w_context[:, gate]
                + bias[gate]
                for gate in range(4)
            )
            cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
            output = (sigmoid(o) * np.tanh(cell)) @ projection
            np.testing.assert_allclose(y[row, t], output, rtol=1e-4, atol=1e-5)


def test_cached_decoding_equals_the_full_forward(memory, targets, logits):
    cache = model(parameters()).empty_cache(memory, L)
    for t in range(L):
        decoded, cache = decode(None, None, targets[:, t : t + 1], cache)
        np.testing.assert_allclose(decoded[:, 0], logits[:, t], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(cache.lengths, [L] * B)


def test_padding_of_the_inputs_changes_nothing(inputs, targets, logits):
    mask = jnp.arange(M) < jnp.array([[6], [4], [1]])
    first, second = (
        decode(encode(padded, mask), mask, targets)[0]
        for padded in (inputs, jnp.where(mask, inputs, 0))
    )
    np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(first[0], logits[0], rtol=1e-5, atol=1e-6)
    assert np.abs(first[1:] - logits[1:]).max() > 1e-3


def test_the_encoder_reads_both_ways_and_the_decoder_does_not_look_ahead(
    inputs, targets, memory, logits
):
    changed = encode(inputs.at[0, 3].set(inputs[0, 3] % (V - 1) + 1))
    assert (changed[0] != memory[0]).any(axis=-1).all()
    np.testing.assert_array_equal(changed[1:], memory[1:])
    after, _ = decode(memory, None, targets.at[0, 2].set(targets[0, 2] % (V - 1) + 1))
    np.testing.assert_array_equal(after[0, :2], logits[0, :2])
    assert (after[0, 2:] != logits[0, 2:]).any(axis=-1).all()


def test_every_expert_and_gate_of_both_moes_has_a_gradient():
    inputs = jax.random.randint(jax.random.key(6), (16, M), 1, V)
    targets = jax.random.randint(jax.random.key(7), (16, L), 1, V)
    abstract_model = AbstractModel.of(CONFIG)

    def loss(values):
        logits, reports = abstract_model.merge(values)(
            inputs, None, targets, None, Mode.TRAIN, jax.random.key(8)
        )
        auxiliary = sum(report.auxiliary_loss.sum() for report in reports)
        return jax.nn.logsumexp(logits).mean() - logits[..., 0].mean() + auxiliary

    gradients = jax.jit(jax.grad(loss))(parameters())
    for path, leaf in jax.tree.leaves_with_path(gradients):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, path
    for half in ("encoder_moe", "decoder_moe"):
        moe = gradients[half]["moe"]
        for leaf in (moe["w_in"], moe["w_out"]):
            assert (np.abs(leaf).max(axis=(1, 2)) > 0).all()
        for leaf in moe["router"].values():
            assert (np.abs(leaf).max(axis=0) > 0).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention_width": 0}, r"model.attention_width is 0; it must be at least 1"),
        ({"num_experts": -1}, r"model.num_experts is -1; it must be at least 0"),
        ({"dropout": 1.0}, r"model.dropout is 1.0; it must be in \[0, 1\)"),
        ({"init_scale": 0.0}, r"model.init_scale is 0.0; it must be above 0"),
        ({"moe": MoEConfig(ExpertChoice(), group_size=8)}, r"ExpertChoice.*would look ahead"),
    ],
)
def test_refusals(fields, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(CONFIG, **fields).validate()


def test_a_dense_translator_has_no_moe():
    config = dataclasses.replace(CONFIG, num_experts=0)
    config.validate()
    assert config.moe_layers == [] and "encoder_moe" not in AbstractModel.of(config).shapes
