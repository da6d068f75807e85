import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.data.tokenizers import ByteTokenizer, Tokenizer
from moe_jax.decoding.beam_search import Beams
from moe_jax.decoding.sampling import Sampling
from moe_jax.decoding.seq2seq import (
    encode_input,
    generated_ids,
    sample,
    search,
    translate_texts,
)
from moe_jax.errors import UserError
from moe_jax.layers.attention import MultiHead, Positions
from moe_jax.layers.embedding import EmbeddingScaling
from moe_jax.layers.mode import Mode
from moe_jax.layers.moe import MoEConfig
from moe_jax.models.abstract_model import AbstractModel
from moe_jax.models.encoder_decoder import EncoderDecoderConfig
from moe_jax.models.stack import StackConfig
from moe_jax.parallel.mesh import MeshConfig, make_mesh
from moe_jax.routing.token_choice import GShard, TopK

V, B, M, L = 40, 3, 7, 5
STACK = StackConfig(
    num_layers=2, width=16, num_heads=2, head_width=8, mlp_width=32, num_experts=4,
    attention=MultiHead(positions=Positions.RELATIVE), moe=MoEConfig(TopK(k=1), group_size=1),
)  # fmt: skip
# A tied table at random would make the model repeat its last token, whatever it reads.
CONFIG = EncoderDecoderConfig(
    vocab_size=V, tied=False, embedding_scaling=EmbeddingScaling.NONE, encoder=STACK, decoder=STACK
)
DEFINITION = AbstractModel.of(CONFIG)
GREEDY = Sampling(temperature=0.0)


def drawn_parameters(config):
    return jax.jit(lambda: nnx.to_pure_dict(nnx.state(config.build(jax.random.key(0)))))()


@pytest.fixture(scope="module")
def parameters():
    return drawn_parameters(CONFIG)


@pytest.fixture(scope="module")
def inputs():
    return jax.random.randint(jax.random.key(1), (B, M), 3, V)


MASK = jnp.arange(M) < jnp.array([M, 4, 1])[:, None]


@jax.jit
def forward(parameters, inputs, targets):
    logits, reports = DEFINITION.merge(parameters)(inputs, MASK, targets, None, Mode.DECODE)
    return logits, [report.auxiliary_loss for report in reports]


@jax.jit
def jitted_search(parameters, inputs):
    return search(DEFINITION.merge(parameters), inputs, MASK, L, Beams(3, 0.6))


@jax.jit
def jitted_greedy(parameters, inputs):
    return sample(DEFINITION.merge(parameters), inputs, MASK, jax.random.key(0), L, GREEDY)


def test_names_of_layers_are_in_the_order_of_the_reports(parameters, inputs):
    _, losses = forward(parameters, inputs, inputs[:, :L])
    assert CONFIG.moe_layers == ["encoder/1", "decoder/1"]
    assert [loss.shape for loss in losses] == [(1,), (1,)]


def test_padding_of_inputs_changes_nothing(parameters, inputs):
    targets = inputs[:, :L]
    logits, _ = forward(parameters, inputs, targets)
    other, _ = forward(parameters, jnp.where(MASK, inputs, 5), targets)
    assert jnp.array_equal(logits, other)
    seen, _ = forward(parameters, inputs.at[1, 3].set(5), targets)
    assert not jnp.allclose(seen[1], logits[1])


def test_targets_see_earlier_targets_only(parameters, inputs):
    targets = inputs[:, :L]
    logits, _ = forward(parameters, inputs, targets)
    other, _ = forward(parameters, inputs, targets.at[:, 3].set(5))
    assert jnp.array_equal(logits[:, :3], other[:, :3])
    assert not jnp.allclose(logits[:, 3], other[:, 3])


def test_inputs_see_both_sides(parameters, inputs):
    def memory(inputs):
        return DEFINITION.merge(parameters).encode(inputs, MASK, Mode.DECODE)[0]

    memory = jax.jit(memory)
    before, after = memory(inputs), memory(inputs.at[0, M - 1].set(5))
    assert not jnp.allclose(before[0, 0], after[0, 0])


def test_cached_greedy_decoding_equals_full_forwards(parameters, inputs):
    decoded = np.asarray(jitted_greedy(parameters, inputs))
    assert len({tuple(row) for row in decoded}) == B
    targets = np.full((B, L), Tokenizer.BOS, np.int32)
    ended = np.zeros(B, bool)
    for n in range(L):
        logits, _ = forward(parameters, inputs, targets)
        best = np.where(ended, Tokenizer.PAD, logits[:, n].argmax(axis=-1))
        assert np.array_equal(decoded[:, n], best)
        ended |= best == Tokenizer.EOS
        if n + 1 < L:
            targets[:, n + 1] = best


def test_scores_of_beams_equal_those_of_full_forwards(parameters, inputs):
    found, scores = jitted_search(parameters, inputs)
    assert (jnp.diff(scores, axis=1) <= 0).all()
    assert len({tuple(np.asarray(target)) for target in found[0]}) == 3
    for beam in range(3):
        tokens = found[:, beam]
        shifted = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)), constant_values=Tokenizer.BOS)
        logits, _ = forward(parameters, inputs, shifted)
        real = tokens != Tokenizer.PAD
        each = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)[..., 0]
        expected = (each * real).sum(axis=1) / ((5 + real.sum(axis=1)) / 6) ** 0.6
        assert scores[:, beam] == pytest.approx(np.asarray(expected), abs=1e-5)


def test_a_text_translates_alike_alone_and_in_a_batch_on_a_mesh():
    config = dataclasses.replace(CONFIG, vocab_size=264)
    model = AbstractModel.of(config).merge(drawn_parameters(config))
    texts = ["one", "a longer text", ""]

    def translated(mesh, texts, method):
        return translate_texts(model, make_mesh(mesh), ByteTokenizer(), texts, 4, method, seed=0)

    batch = translated(MeshConfig(data=2, expert=4), texts, Beams(1))
    assert translated(MeshConfig(), texts[1:2], GREEDY) == batch[1:2]
    assert len(set(batch)) > 1


def test_inputs_are_read_as_targets_are_written():
    tokenizer = ByteTokenizer(extra_ids=2)
    text = "a <extra_id_0> b <extra_id_1>"
    tokens = encode_input(tokenizer, text)
    assert tokens[-3:].tolist() == [tokenizer.encode(" ")[0], 259, Tokenizer.EOS]
    assert tokenizer.decode(tokens) == text
    assert ByteTokenizer().decode(encode_input(ByteTokenizer(), text)) == text
    assert generated_ids(tokenizer, 264).nonzero()[0].tolist() == [2, *range(3, 261)]
    with pytest.raises(UserError, match=r"has <extra_id_2>, but the run's tokenizer has 2 extra"):
        encode_input(tokenizer, "<extra_id_2>")


def test_tables_of_sources_and_targets():
    def sizes(**fields):
        shapes = AbstractModel.of(dataclasses.replace(CONFIG, **fields)).shapes
        return {
            f"{name}/{table}": leaf.shape[0]
            for name in ("inputs", "targets")
            for table, leaf in (shapes.get(name) or {}).items()
        }

    assert sizes() == {"inputs/table": 40, "inputs/output": 40}
    assert sizes(tied=True) == {"inputs/table": 40}
    assert sizes(tied=True, target_vocab_size=24) == {"inputs/table": 40, "targets/table": 24}
    assert sizes(target_vocab_size=24) == {
        "inputs/table": 40, "targets/table": 24, "targets/output": 24,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": 0}, "model.vocab_size is 0; it must be at least 1."),
        (
            {"decoder": dataclasses.replace(STACK, width=8)},
            "model.decoder.width is 8, but model.encoder.width is 16, and",
        ),
        (
            {"encoder": dataclasses.replace(STACK, mlp_width=0)},
            "model.encoder.mlp_width is 0; it must be at least 1.",
        ),
        (
            {"embedding_scaling": EmbeddingScaling.LOGITS},
            "model.embedding_scaling is logits, but model.tied is false",
        ),
        (
            {"decoder": dataclasses.replace(STACK, moe=MoEConfig(GShard()))},
            "model.decoder.moe.router is GShard, with which a decoder would look ahead",
        ),
    ],
)
def test_models_that_could_not_be_built(fields, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(CONFIG, **fields).validate()
