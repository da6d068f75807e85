"""A batch computed in microbatches is the whole batch, however unequal their targets are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.data.tokenizers import Tokenizer
from moe_jax.errors import UserError
from moe_jax.layers.embedding import EmbeddingScaling
from moe_jax.layers.moe import MoEConfig
from moe_jax.models.abstract_model import AbstractModel
from moe_jax.models.decoder_lm import DecoderLMConfig
from moe_jax.models.encoder_decoder import EncoderDecoderConfig
from moe_jax.models.mixtures.mixture import MixtureConfig
from moe_jax.models.recurrent_lm import RecurrentLMConfig
from moe_jax.models.recurrent_translator import RecurrentTranslatorConfig
from moe_jax.models.stack import StackConfig
from moe_jax.models.vision import VisionConfig
from moe_jax.parallel.mesh import TOKEN_AXES, MeshConfig, make_mesh
from moe_jax.routing.capacity import Capacity
from moe_jax.routing.catalogue import ENTRIES
from moe_jax.routing.deepseek import DeepSeekV3
from moe_jax.routing.losses import Losses
from moe_jax.routing.token_choice import TopK
from moe_jax.tasks.image_classification import ClassLoss, ImageClassification
from moe_jax.tasks.language_modeling import LanguageModeling
from moe_jax.tasks.masked_language_modeling import MaskedLanguageModeling
from moe_jax.tasks.mixture_regression import MixtureRegression
from moe_jax.tasks.text_to_text import TextToText
from moe_jax.training.experiment import Experiment
from moe_jax.training.microbatches import loss_counts, split_rows
from moe_jax.training.state import TrainState
from moe_jax.training.step import noise_key, train_step

B, L, V, N = 8, 8, 32, 4
ROWS = jnp.arange(B)
# Every loss that means over tokens, over groups and over sequences.
ALL_LOSSES = Losses(
    load_balancing=0.1,
    load_balancing_all_choices=0.1,
    expert_level=0.1,
    device_level=0.1,
    sequence_wise=0.1,
    importance=0.1,
    router_z=0.1,
    devices=2,
)
SMALL = {"num_layers": 2, "width": 8, "num_heads": 2, "head_width": 4, "mlp_width": 16}


def moe(router=None):
    return MoEConfig(router=router or TopK(k=2, losses=ALL_LOSSES), group_size=L)


def biased(rate):
    """Biases that move by the signs of loads, and a loss that means over sequences."""
    losses = Losses(sequence_wise=0.1)
    return DeepSeekV3(k=2, losses=losses, groups=1, groups_per_token=1, bias_rate=rate)


def decoder(**fields):
    return DecoderLMConfig(
        **SMALL, vocab_size=V, max_length=L, num_experts=4, moe_every=1, moe=moe(), **fields
    )


def encoder_decoder():
    stacks = [
        StackConfig(**{**SMALL, "num_layers": 1}, num_experts=4, moe_every=1, moe=moe(biased(rate)))
        for rate in (1e-2, 1e-3)
    ]
    return EncoderDecoderConfig(
        vocab_size=V,
        embedding_scaling=EmbeddingScaling.NONE,
        encoder=stacks[0],
        decoder=stacks[1],
    )


class MaskedByContent(MaskedLanguageModeling):
    """Masks the tokens 1 to 4, wherever they are: the same in the whole batch and in its parts."""

    def _training_mask(self, batch, key):
        tokens = batch["tokens"][:, :-1]
        return (tokens >= 1) & (tokens <= 4)


def tokens(length):
    return jax.random.randint(jax.random.key(1), (B, length), 5, V)


def text():
    return {"tokens": tokens(L + 1)}


def text_to_mask(in_first):
    """Microbatch 0 has `in_first` masked tokens, all others 8 in each row."""
    masked = jnp.where(ROWS % N == 0, in_first, L)
    return {"tokens": jnp.where(jnp.arange(L + 1) < masked[:, None], 3, tokens(L + 1))}


def pairs(in_first, inputs_in_first=L):
    """Microbatch 0 has targets of `in_first` tokens, all others of 8; inputs likewise."""

    def cut(values, lengths):
        real = jnp.arange(values.shape[1]) < lengths[:, None]
        return jnp.where(real, values, Tokenizer.PAD)

    first = ROWS % N == 0
    return {
        "inputs": cut(tokens(L), jnp.where(first, inputs_in_first, L)),
        "targets": cut(tokens(L + 1), jnp.where(first, 1 + in_first, L + 1)),
    }


def half_with_one_target():
    """Half of the rows have 8 targets and half have 1."""
    rows = pairs(L)["targets"]
    lengths = jnp.where(ROWS % 2 == 0, L + 1, 2)
    return {
        "inputs": tokens(L),
        "targets": jnp.where(jnp.arange(L + 1) < lengths[:, None], rows, Tokenizer.PAD),
    }


def images():
    return {
        "image": jax.random.normal(jax.random.key(2), (B, 8, 8, 1)),
        "label": jnp.arange(B) % 5,
    }


def cases():
    return {
        "inputs": jax.random.normal(jax.random.key(3), (B, 2)),
        "targets": jax.random.normal(jax.random.key(4), (B, 1)),
    }


RECURRENT = {"vocab_size": V, "width": 8, "units": 8, "num_experts": 4, "mlp_width": 16}
VISION = VisionConfig(
    **SMALL, image_size=8, patch_size=4, channels=1, num_classes=5, num_experts=4, moe_every=1,
    moe=MoEConfig(router=TopK(k=2, losses=ALL_LOSSES), group_size=5),
)  # fmt: skip
TASKS = {
    "language modeling": (decoder(), LanguageModeling(), text()),
    "two passes": (decoder(), LanguageModeling(consistency_weight=1.0), text()),
    "recurrent language modeling": (
        RecurrentLMConfig(**RECURRENT, max_length=L, moe=moe(), remat_moe=True),
        LanguageModeling(),
        text(),
    ),
    "masked, few in one": (decoder(bidirectional=True), MaskedByContent(), text_to_mask(1)),
    "masked, none in one": (decoder(bidirectional=True), MaskedByContent(), text_to_mask(0)),
    "text to text": (
        encoder_decoder(),
        TextToText(label_smoothing=0.1, z_loss=1e-2),
        pairs(1, 3),
    ),
    "text to text, half with one target": (encoder_decoder(), TextToText(), half_with_one_target()),
    "text to text, one without targets": (encoder_decoder(), TextToText(), pairs(0)),
    "text to text, one of padding": (encoder_decoder(), TextToText(), pairs(0, 0)),
    "recurrent translation": (
        RecurrentTranslatorConfig(**RECURRENT, attention_width=4, moe=moe()),
        TextToText(),
        pairs(1, 3),
    ),
    "images": (VISION, ImageClassification(loss=ClassLoss.SIGMOID), images()),
    "mixture": (MixtureConfig(), MixtureRegression(classes=False), cases()),
}


def drawn(abstract_model):
    """Parameters of which none is 0, so that every gradient is one."""
    keys = iter(jax.random.split(jax.random.key(5), len(jax.tree.leaves(abstract_model.shapes))))
    return jax.tree.map(
        lambda shape: 0.2 * jax.random.normal(next(keys), shape.shape), abstract_model.shapes
    )


def zeros(abstract_model):
    return jax.tree.map(lambda shape: jnp.zeros(shape.shape), abstract_model.variable_shapes)


def after_a_step(config, task, batch, microbatches, mesh_config=None):
    """What the step subtracts from each parameter, the new variables, and metrics."""
    abstract_model, optimizer = AbstractModel.of(config), optax.sgd(1.0)
    step = train_step(abstract_model, task, optimizer, False, microbatches)
    mesh = make_mesh(mesh_config or MeshConfig())
    with jax.set_mesh(mesh):
        parameters = drawn(abstract_model)
        state = TrainState(
            jnp.zeros((), jnp.int32), parameters, zeros(abstract_model), optimizer.init(parameters)
        )
        batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec(TOKEN_AXES)))
        after, metrics = jax.jit(step)(state, batch, noise_key(0))
        moved = jax.tree.map(jnp.subtract, parameters, after.parameters)
        return jax.device_get((moved, after.variables, metrics))


def assert_equal_steps(found, expected):
    """Losses to 1e-6, the gradient but for what float32 rounds (measured: up to 1e-6 of its norm),
    biases to the bit, what single layers report to 1e-5.
    """
    (moved, variables, metrics), (whole, whole_variables, whole_metrics) = found, expected
    difference = jax.tree.map(np.subtract, moved, whole)
    norm = optax.tree_utils.tree_norm
    assert norm(whole) > 1e-3
    assert norm(difference) < 2e-6 * norm(whole)
    jax.tree.map(np.testing.assert_array_equal, variables, whole_variables)
    reports, whole_reports = metrics.pop("router"), whole_metrics.pop("router")
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
    jax.tree.map(close, metrics, whole_metrics)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, reports, whole_reports)


@pytest.mark.parametrize("name", TASKS)
def test_four_parts_are_the_whole_batch(name):
    assert_equal_steps(*(after_a_step(*TASKS[name], parts) for parts in (N, 1)))


def test_parts_are_the_batch_on_a_mesh():
    case = TASKS["text to text"]
    rows = jax.tree.map(lambda values: jnp.concatenate([values] * 4), case[2])
    mesh = MeshConfig(data=2, expert=4)
    assert_equal_steps(
        after_a_step(*case[:2], rows, N, mesh), after_a_step(*case[:2], rows, 1, mesh)
    )


def test_without_any_targets_there_are_only_the_routers_losses():
    config, task, batch = TASKS["text to text"]
    batch = {**batch, "targets": batch["targets"].at[:, 1:].set(Tokenizer.PAD)}
    parts, whole = (after_a_step(config, task, batch, number) for number in (N, 1))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(parts))
    assert parts[2]["loss"] == 0 < parts[2]["auxiliary_loss"]
    assert_equal_steps(parts, whole)


@pytest.mark.parametrize(
    "entry",
    [entry for entry in ENTRIES if entry.router.loss_coefficients],
    ids=lambda entry: entry.name,
)
def test_counting_does_not_compute_the_model(entry):
    """Whatever a router's losses are means over follows from masks."""
    config = DecoderLMConfig(
        **SMALL,
        max_length=64,
        moe=MoEConfig(entry.router, entry.capacity or Capacity(), group_size=64),
        bidirectional=True,
    )
    abstract_model = AbstractModel.of(config)
    parts = (jnp.arange(N), split_rows({"tokens": tokens(65)}, N))

    def counts(parameters, parts):
        return loss_counts(
            abstract_model,
            MaskedByContent(),
            parameters,
            zeros(abstract_model),
            parts,
            jax.random.key(0),
        )

    text_of_program = jax.jit(counts).lower(abstract_model.shapes, parts).as_text()
    assert "dot_general" not in text_of_program


class BatchWise(LanguageModeling):
    """Compares rows with each other."""

    def training_loss(self, model, batch, key):
        loss, metrics = super().training_loss(model, batch, key)
        return loss**2, metrics


class BatchWiseAgain(BatchWise):
    """Says that it is a mean over targets."""

    def num_targets(self, batch, key):
        return super().num_targets(batch, key)


def test_a_task_says_with_its_loss_whether_it_is_separable():
    for _, task, _ in TASKS.values():
        assert task.separable
    assert not BatchWise().separable
    assert BatchWiseAgain().separable


def test_a_loss_that_is_not_separable_is_refused_in_microbatches():
    config = Experiment(task=BatchWise())
    config.validate()
    config.microbatches = 2
    with pytest.raises(UserError, match="microbatches is 2, but the task BatchWise does not say"):
        config.validate()
    abstract_model = AbstractModel.of(decoder())
    with pytest.raises(UserError, match="use microbatches=1, or define num_targets"):
        train_step(abstract_model, BatchWise(), optax.sgd(1.0), False, 2)
    config.task = BatchWiseAgain()
    config.validate()
