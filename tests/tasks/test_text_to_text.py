"""The text-to-text task, with a model whose predictions are written down."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.data.pairs import PairData
from moe_jax.data.pipelines import TextData
from moe_jax.data.span_corruption import SpanCorruptionData
from moe_jax.data.tokenizers import Bytes
from moe_jax.errors import UserError
from moe_jax.layers.mode import Mode
from moe_jax.layers.moe import MoEReport
from moe_jax.models.decoder_lm import DecoderLMConfig
from moe_jax.models.encoder_decoder import EncoderDecoderConfig
from moe_jax.models.recurrent_translator import RecurrentTranslatorConfig
from moe_jax.routing.deepseek import DeepSeekV3
from moe_jax.tasks.text_to_text import TextToText

V = 16
BATCH = {
    "inputs": jnp.array([[5, 6, 2, 0], [7, 2, 0, 0], [0, 0, 0, 0]]),
    "targets": jnp.array([[1, 8, 9, 2], [1, 9, 2, 0], [0, 0, 0, 0]]),
    "domain": jnp.array([1, 0, 0]),
    "mask": jnp.array([True, True, False]),
}
REAL = np.array([[1, 1, 1], [1, 1, 0], [0, 0, 0]], bool)


@dataclasses.dataclass
class Oracle:
    """Predicts by `logits(targets, key)`, with an auxiliary loss of 0.5; keeps its arguments."""

    logits: object
    given: list = dataclasses.field(default_factory=list)

    def __call__(self, inputs, input_mask, targets, target_mask, mode, key=None):
        self.given.append(types.SimpleNamespace(**locals()))
        report = MoEReport({}, {}, auxiliary_loss=jnp.array([0.25, 0.25]))
        return self.logits(targets, key), [report]


def random_logits(targets, key):
    key = jax.random.key(0) if key is None else key
    return jax.random.normal(key, (*targets.shape, V))


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def expected_loss(logits):
    """The cross-entropy of the five real targets."""
    picked = np.take_along_axis(log_softmax(logits), np.asarray(BATCH["targets"])[:, 1:, None], -1)
    return -picked[..., 0][REAL].mean()


def test_padding_is_neither_predicted_nor_routed():
    model, key = Oracle(random_logits), jax.random.key(1)
    total, metrics = TextToText().training_loss(model, BATCH, key)
    (given,) = model.given
    np.testing.assert_array_equal(given.targets, BATCH["targets"][:, :-1])
    np.testing.assert_array_equal(given.target_mask, REAL)
    np.testing.assert_array_equal(given.input_mask, BATCH["inputs"] > 0)
    assert given.mode == Mode.TRAIN
    logits = random_logits(BATCH["targets"][:, 1:], key)
    assert metrics["loss"] == pytest.approx(expected_loss(logits), rel=1e-5)
    assert total == pytest.approx(expected_loss(logits) + 0.5, rel=1e-5)
    right = (np.argmax(logits, -1) == BATCH["targets"][:, 1:])[REAL].mean()
    assert metrics["accuracy"] == pytest.approx(right)


def test_label_smoothing_and_z_loss_by_hand():
    key = jax.random.key(1)
    logits = random_logits(BATCH["targets"][:, 1:], key)
    spread = -log_softmax(logits).mean(axis=-1)[REAL].mean()
    log_z = np.log(np.exp(np.asarray(logits, np.float64)).sum(axis=-1))[REAL]
    task = TextToText(label_smoothing=0.1, z_loss=0.01)
    total, metrics = task.training_loss(Oracle(random_logits), BATCH, key)
    expected = 0.9 * expected_loss(logits) + 0.1 * spread + 0.01 * (log_z**2).mean() + 0.5
    assert total == pytest.approx(expected, rel=1e-5)
    assert metrics["loss"] == pytest.approx(expected_loss(logits), rel=1e-5)


def test_thors_consistency_adds_a_second_pass():
    key, model = jax.random.key(1), Oracle(random_logits)
    total, metrics = TextToText(consistency_weight=5.0).training_loss(model, BATCH, key)
    assert len(model.given) == 2
    first, second = (
        log_softmax(random_logits(BATCH["targets"][:, 1:], draw))
        for draw in (key, jax.random.fold_in(key, 2))
    )
    divergence = 0.5 * ((np.exp(first) - np.exp(second)) * (first - second)).sum(axis=-1)
    consistency = divergence[REAL].mean()
    assert metrics["consistency_loss"] == pytest.approx(consistency, rel=1e-5)
    losses = expected_loss(first) + expected_loss(second)
    assert total == pytest.approx(losses + 2 * 0.5 + 5 * consistency, rel=1e-5)


def test_a_batch_of_padding_has_no_loss():
    empty = {name: jnp.zeros_like(value) for name, value in BATCH.items()}
    loss, _ = TextToText().training_loss(Oracle(random_logits), empty, jax.random.key(0))
    assert loss == 0.5


def test_evaluation_sums_by_domain():
    model = Oracle(lambda targets, key: 100.0 * jax.nn.one_hot(jnp.full(targets.shape, 9), V))
    sums = TextToText(label_smoothing=0.5, z_loss=1.0).evaluation_sums(model, BATCH, 3)
    assert model.given[0].mode == Mode.EVALUATE
    # Targets 8, 9, 2 in domain 1 and 9, 2 in domain 0; 9 is right and others cost 100.
    np.testing.assert_allclose(sums["loss"][0], [100, 200, 0], rtol=1e-5)
    np.testing.assert_array_equal(sums["accuracy"][0], [1, 1, 0])
    np.testing.assert_array_equal(sums["loss"][1], [2, 3, 0])


def _model(**routers):
    model = EncoderDecoderConfig(vocab_size=264)
    for stack in ("encoder", "decoder"):
        config = getattr(model, stack)
        config.num_experts = 4
        config.moe_every = 1
        config.moe = dataclasses.replace(config.moe, group_size=32)
    for stack, router in routers.items():
        config = getattr(model, stack)
        config.moe = dataclasses.replace(config.moe, router=router)
    return model


def test_groups_are_of_inputs_and_targets():
    data = PairData(input_length=64, target_length=48)
    model = _model()
    assert TextToText().moe_inputs(model, data) == [
        ("model.encoder.moe.group_size", 64, 32),
        ("model.decoder.moe.group_size", 48, 32),
    ]
    model.encoder.moe_every = 0
    assert TextToText().moe_inputs(model, data) == [("model.decoder.moe.group_size", 48, 32)]
    corrupted = SpanCorruptionData(input_length=512)
    recurrent = RecurrentTranslatorConfig()
    assert TextToText().moe_inputs(recurrent, corrupted) == [
        ("model.moe.group_size", 512, 512),  # A row each.
        ("model.moe.group_size", 114, 114),
    ]


@pytest.mark.parametrize(
    ("task", "model", "data", "message"),
    [
        (TextToText(label_smoothing=1.0), _model(), PairData(), "task.label_smoothing is 1.0; it"),
        (TextToText(z_loss=-1.0), _model(), PairData(), "task.z_loss is -1.0; it must be at least"),
        (
            TextToText(consistency_weight=-1.0),
            _model(),
            PairData(),
            "task.consistency_weight is -1",
        ),
        (
            TextToText(),
            _model(),
            TextData(),
            "data is TextData.*use PairData or SpanCorruptionData",
        ),
        (TextToText(), DecoderLMConfig(), PairData(), "model is DecoderLMConfig.*use EncoderDec"),
        (
            TextToText(),
            _model(),
            PairData(tokenizer=Bytes(extra_ids=100)),
            "model.vocab_size is 264, smaller than the tokenizer's 359 ids",
        ),
        (
            TextToText(),
            dataclasses.replace(_model(), target_vocab_size=100),
            PairData(),
            "model.target_vocab_size is 100, smaller than the tokenizer's 259 ids",
        ),
        (
            TextToText(consistency_weight=1.0),
            _model(encoder=DeepSeekV3(k=2, groups=1)),
            PairData(),
            "model.encoder.moe.router DeepSeekV3 moves its expert bias",
        ),
    ],
)
def test_bad_fields_are_named(task, model, data, message):
    with pytest.raises(UserError, match=message):
        task.validate(model, data)
    TextToText().validate(_model(), PairData())


def test_observed_layers_have_the_tokens_of_their_stack():
    """The encoder has two layers in one stage and one in another; the decoder has one."""
    config = _model()
    config.encoder.num_layers, config.decoder.num_layers = 3, 1
    config.encoder.moe = dataclasses.replace(config.encoder.moe, group_size=6)
    config.decoder.moe = dataclasses.replace(config.decoder.moe, group_size=9)

    def report(*routings):
        loads = jnp.zeros((len(routings), 4))
        return MoEReport({}, {"load": loads}, routing=jnp.array(routings))

    class Model:
        def __init__(self):
            self.config = config

        def __call__(self, inputs, input_mask, targets, target_mask, mode, key=None):
            assert mode == Mode.OBSERVE
            return random_logits(targets, key), [report(10, 11), report(12), report(20)]

    observed = TextToText().observe(Model(), BATCH)
    assert {name: int(layer.routing) for name, layer in observed.items()} == {
        "encoder/0": 10,
        "encoder/1": 11,
        "encoder/2": 12,
        "decoder/0": 20,
    }
    encoder, decoder = observed["encoder/2"], observed["decoder/0"]
    np.testing.assert_array_equal(encoder.tokens.token_ids, BATCH["inputs"].reshape(2, 6))
    np.testing.assert_array_equal(encoder.tokens.mask, (BATCH["inputs"] > 0).reshape(2, 6))
    np.testing.assert_array_equal(decoder.tokens.token_ids, BATCH["targets"][:, :-1].reshape(1, 9))
    np.testing.assert_array_equal(decoder.tokens.mask, REAL.reshape(1, 9))
    assert (encoder.length, decoder.length) == (4, 3)
