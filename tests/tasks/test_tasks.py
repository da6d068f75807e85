"""Losses of the tasks, with a model whose predictions are written down."""

import dataclasses
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.data.interface import DataConfig
from moe_jax.data.pipelines import TextData
from moe_jax.data.tokenizers import Bytes
from moe_jax.errors import UserError
from moe_jax.layers.moe import MoEReport
from moe_jax.models.decoder_lm import DecoderLMConfig
from moe_jax.routing.deepseek import DeepSeekV3
from moe_jax.tasks.auxiliary import LayerReduction, auxiliary_loss
from moe_jax.tasks.language_modeling import LanguageModeling, symmetric_divergence
from moe_jax.tasks.masked_language_modeling import MaskedLanguageModeling

V = 264
CONFIG = DecoderLMConfig()
DATA = TextData()
BATCH = {
    "tokens": jnp.arange(2 * 9).reshape(2, 9),
    "domain": jnp.array([1, 0]),
    "mask": jnp.array([True, False]),
}


@dataclasses.dataclass
class Oracle:
    """Predicts by `logits(tokens, key)`; remembers what it was given."""

    logits: object
    given: list = dataclasses.field(default_factory=list)
    config: object = dataclasses.field(
        default_factory=lambda: types.SimpleNamespace(moe=CONFIG.moe)
    )

    def __call__(self, tokens, mask, mode, key=None):
        self.given.append(tokens)
        return self.logits(tokens, key), [], None


def uniform(tokens, key):
    return jnp.zeros((*tokens.shape, V))


# Auxiliary losses


def report(*auxiliary_losses):
    return MoEReport({}, {}, auxiliary_loss=jnp.array(auxiliary_losses))


def test_auxiliary_losses_are_summed_or_averaged_over_all_layers_of_all_stages():
    reports = [report(1.0, 2.0), report(6.0)]
    assert auxiliary_loss(reports, LayerReduction.SUM) == 9
    assert auxiliary_loss(reports, LayerReduction.MEAN) == 3
    assert auxiliary_loss([], LayerReduction.SUM) == 0


# Next tokens, and THOR's consistency


def test_language_modeling_predicts_the_next_token():
    def next_token(tokens, key):
        return 100.0 * jax.nn.one_hot(tokens + 1, V)

    loss, metrics = LanguageModeling().training_loss(Oracle(next_token), BATCH, jax.random.key(0))
    assert loss == metrics["loss"] == pytest.approx(0, abs=1e-6)
    measured = LanguageModeling().evaluation_sums(Oracle(uniform), BATCH, 3)
    # Row 0 is of domain 1; row 1 only fills the batch.
    np.testing.assert_allclose(measured["loss"][0], [0, 8 * math.log(V), 0], rtol=1e-5)
    # Of equal logits the first counts, and no target is token 0.
    np.testing.assert_array_equal(measured["accuracy"][0], [0, 0, 0])
    measured = LanguageModeling().evaluation_sums(Oracle(next_token), BATCH, 3)
    np.testing.assert_array_equal(measured["accuracy"][0], [0, 8, 0])
    for _, counts in measured.values():
        np.testing.assert_array_equal(counts, [0, 8, 0])


def test_symmetric_divergence_by_hand():
    # p = (1/2, 1/2), q = (3/4, 1/4): the halves of KL(p||q) + KL(q||p) are
    # (1/2) ln(2/3) + (1/2) ln 2 = 0.14384 and (3/4) ln(3/2) + (1/4) ln(1/2) = 0.13081.
    p, q = jnp.log(jnp.array([[[0.5, 0.5]]])), jnp.log(jnp.array([[[0.75, 0.25]]]))
    assert symmetric_divergence(p, q)[0, 0] == pytest.approx((0.14384 + 0.13081) / 2, rel=1e-4)
    assert symmetric_divergence(q, p)[0, 0] == pytest.approx(symmetric_divergence(p, q)[0, 0])
    assert symmetric_divergence(p + 7, p)[0, 0] == pytest.approx(0, abs=1e-6)


def test_thors_consistency_adds_a_second_pass_with_other_draws():
    def noisy(tokens, key):
        return jax.random.normal(key, (*tokens.shape, V))

    key, task = jax.random.key(0), LanguageModeling(consistency_weight=5.0)
    oracle = Oracle(noisy)
    total, metrics = task.training_loss(oracle, BATCH, key)
    assert len(oracle.given) == 2
    tokens = BATCH["tokens"]
    losses, logits = [], []
    for draw in (key, jax.random.fold_in(key, 2)):
        logits.append(np.asarray(noisy(tokens[:, :-1], draw), np.float64))
        p = np.exp(logits[-1]) / np.exp(logits[-1]).sum(axis=-1, keepdims=True)
        picked = np.take_along_axis(p, np.asarray(tokens[:, 1:])[..., None], axis=-1)
        losses.append(-np.log(picked).mean())
    consistency = float(np.mean(symmetric_divergence(*map(jnp.asarray, logits))))
    assert metrics["loss"] == pytest.approx(losses[0], rel=1e-5)
    assert metrics["consistency_loss"] == pytest.approx(consistency, rel=1e-5)
    assert total == pytest.approx(sum(losses) + 5 * consistency, rel=1e-5)


# Masked tokens


def test_masked_tokens_are_hidden_and_only_they_are_predicted():
    seen = Oracle(uniform)
    task = MaskedLanguageModeling(mask_rate=0.5)
    loss, _ = task.training_loss(seen, BATCH, jax.random.key(0))
    assert loss == pytest.approx(math.log(V), rel=1e-5)
    (tokens,) = seen.given
    hidden = np.asarray(tokens == 259)
    assert 0 < hidden.sum() < hidden.size
    np.testing.assert_array_equal(tokens[~hidden], BATCH["tokens"][:, :-1][~hidden])

    def knows_what_it_sees(tokens, key):
        return 100.0 * jax.nn.one_hot(tokens, V)  # Wrong exactly where it sees the mask.

    loss, _ = task.training_loss(Oracle(knows_what_it_sees), BATCH, jax.random.key(0))
    assert loss == pytest.approx(100, rel=1e-4), "tokens that were not masked count"


def test_masked_evaluation_hides_the_same_positions_every_time():
    task = MaskedLanguageModeling(mask_rate=0.5)
    tokens = np.asarray(task.evaluation_tokens(BATCH))
    hidden = tokens == 259
    np.testing.assert_array_equal(tokens, task.evaluation_tokens(BATCH))
    sums, counts = task.evaluation_sums(Oracle(uniform), BATCH, 2)["loss"]
    np.testing.assert_array_equal(counts, [0, hidden[0].sum()])
    np.testing.assert_allclose(sums, [0, hidden[0].sum() * math.log(V)], rtol=1e-5)


def test_consistency_is_refused_where_every_pass_would_move_the_expert_bias():
    task, router = LanguageModeling(consistency_weight=1.0), DeepSeekV3(k=2, groups=1)
    model = dataclasses.replace(CONFIG, moe=dataclasses.replace(CONFIG.moe, router=router))
    with pytest.raises(UserError, match=r"consistency_weight is 1.0.*DeepSeekV3 moves its expert"):
        task.validate(model, DATA)
    LanguageModeling().validate(model, DATA)


@pytest.mark.parametrize(
    ("task", "model", "message"),
    [
        (LanguageModeling(consistency_weight=-1.0), {}, "task.consistency_weight is -1.0; it must"),
        (LanguageModeling(), {"bidirectional": True}, "would see its answer; use the task Masked"),
        (MaskedLanguageModeling(), {}, "model.bidirectional is false.*set it to true"),
        (MaskedLanguageModeling(mask_rate=1.0), {}, "task.mask_rate is 1.0; it must be between"),
        (MaskedLanguageModeling(mask_id=264), {}, "task.mask_id is 264.*model.vocab_size=264"),
    ],
)
def test_bad_fields_are_named(task, model, message):
    with pytest.raises(UserError, match=message):
        task.validate(dataclasses.replace(CONFIG, **model), DATA)


@dataclasses.dataclass
class NoText(DataConfig):
    """Data of another kind."""

    tokens_per_row = 1
    row_shapes = None

    def open(self, seed):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("task", "model", "data", "message"),
    [
        (LanguageModeling(), CONFIG, NoText(), "data is NoText, but .* rows of text; use TextData"),
        (LanguageModeling(), NoText(), DATA, "model is NoText, but .* use DecoderLMConfig"),
        (
            LanguageModeling(),
            CONFIG,
            TextData(tokenizer=Bytes(extra_ids=10)),
            "model.vocab_size is 264, smaller than the tokenizer's 269 ids",
        ),
        (LanguageModeling(), CONFIG, TextData(sequence_length=257), "sequence_length is 257, long"),
        (
            MaskedLanguageModeling(mask_id=258),
            dataclasses.replace(CONFIG, bidirectional=True),
            DATA,
            "task.mask_id is 258, which the tokenizer uses for text; use a number from 259",
        ),
    ],
)
def test_a_model_or_data_that_do_not_fit_are_named(task, model, data, message):
    with pytest.raises(UserError, match=message):
        task.validate(model, data)


def test_groups_are_of_the_tokens_of_rows_and_a_dense_model_has_none():
    task = LanguageModeling()
    assert task.moe_inputs(CONFIG, TextData(sequence_length=32)) == [
        ("model.moe.group_size", 32, CONFIG.moe.group_size or 32)
    ]
    assert task.moe_inputs(dataclasses.replace(CONFIG, moe_every=0), DATA) == []
