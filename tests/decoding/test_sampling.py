import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.decoding.sampling import Sampling, draw, generate, left_padded
from moe_jax.errors import UserError
from moe_jax.layers.mode import Mode
from moe_jax.layers.moe import MoEConfig
from moe_jax.models.abstract_model import AbstractModel
from moe_jax.models.decoder_lm import DecoderLMConfig
from moe_jax.routing.token_choice import TopK

V, N = 32, 5
GREEDY = Sampling(temperature=0.0)
CONFIG = DecoderLMConfig(
    vocab_size=V, max_length=16, num_layers=2, width=16, num_heads=2, head_width=8, mlp_width=32,
    num_experts=4, moe=MoEConfig(TopK(k=1), group_size=16),
)  # fmt: skip
PROMPTS = [np.array([3, 1, 4]), np.array([1, 5, 9, 2, 6, 5]), np.array([27])]
LOGITS = jnp.log(jnp.array([[0.1, 0.4, 0.2, 0.3]]))


DEFINITION = AbstractModel.of(CONFIG)


@pytest.fixture(scope="module")
def parameters():
    return jax.jit(lambda: nnx.to_pure_dict(nnx.state(CONFIG.build(jax.random.key(0)))))()


@functools.partial(jax.jit, static_argnames="sampling")
def jitted_generate(parameters, tokens, mask, key, sampling):
    return generate(DEFINITION.merge(parameters), tokens, mask, key, N, sampling)


def generated(parameters, prompts, sampling=GREEDY, seed=0):
    tokens, mask = left_padded(prompts, pad=0)
    return np.asarray(jitted_generate(parameters, tokens, mask, jax.random.key(seed), sampling))


@pytest.fixture(scope="module")
def batch(parameters):
    return generated(parameters, PROMPTS)


def test_greedy_equals_a_loop_of_full_forwards(parameters, batch):
    @jax.jit
    def next_tokens(parameters, tokens):
        model = DEFINITION.merge(parameters)
        return jnp.argmax(model(tokens, None, Mode.DECODE)[0], axis=-1)

    # The model is causal, so one buffer of fixed length serves every prefix.
    buffer = np.zeros((len(PROMPTS), 16), np.int32)
    for row, prompt in enumerate(PROMPTS):
        buffer[row, : len(prompt)] = prompt
    for n in range(N):
        best = np.asarray(next_tokens(parameters, buffer))
        for row, prompt in enumerate(PROMPTS):
            buffer[row, len(prompt) + n] = best[row, len(prompt) + n - 1]
    for row, prompt in enumerate(PROMPTS):
        np.testing.assert_array_equal(batch[row], buffer[row, len(prompt) : len(prompt) + N])


def test_a_prompt_padded_in_a_batch_equals_it_alone(parameters, batch):
    np.testing.assert_array_equal(generated(parameters, PROMPTS[:1])[0], batch[0])


def test_samples_follow_the_key(parameters):
    hot = Sampling(temperature=5.0, top_k=8)
    one, again, other = (generated(parameters, PROMPTS, hot, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()
    assert one.shape == (len(PROMPTS), N)
    assert one.dtype == np.int32


@functools.partial(jax.jit, static_argnames="sampling")
def many_draws(sampling):
    # Every row draws for itself.
    return draw(jnp.tile(LOGITS, (4000, 1)), sampling, jax.random.key(0))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_have_the_tempered_frequencies(temperature):
    drawn = np.bincount(many_draws(Sampling(temperature)), minlength=4) / 4000
    weights = np.exp(LOGITS[0] / temperature)
    expected = weights / weights.sum()
    # Four standard deviations of a frequency over 4000 draws are at most 0.032.
    np.testing.assert_allclose(drawn, expected, atol=0.032)


def test_top_k_draws_from_the_k_most_probable_and_nothing_else():
    assert set(np.unique(many_draws(Sampling(top_k=2)))) == {1, 3}
    assert set(np.unique(many_draws(Sampling(top_k=1)))) == {1}
    assert set(np.unique(many_draws(Sampling(top_k=4)))) == {0, 1, 2, 3}


def test_temperature_zero_takes_the_most_probable():
    assert draw(LOGITS, GREEDY, jax.random.key(0)) == 1


def test_a_rows_draw_does_not_depend_on_the_other_rows():
    rows, key = jnp.zeros((6, 100)), jax.random.key(4)
    np.testing.assert_array_equal(draw(rows, Sampling(), key)[:2], draw(rows[:2], Sampling(), key))
    assert len(set(np.asarray(draw(rows, Sampling(), key)))) > 1


def test_left_padded():
    tokens, mask = left_padded([np.array([7, 8, 9]), np.array([5])], pad=0)
    np.testing.assert_array_equal(tokens, [[7, 8, 9], [0, 0, 5]])
    np.testing.assert_array_equal(mask, [[1, 1, 1], [0, 0, 1]])


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (Sampling(temperature=-1.0), "temperature is -1.0; it must be at least 0"),
        (Sampling(temperature=float("nan")), "temperature is nan; it must be at least 0"),
        (Sampling(top_k=-1), r"top_k is -1; it must be from 0 \(all\) to 32"),
        (Sampling(top_k=33), r"top_k is 33; it must be from 0 \(all\) to 32"),
    ],
)
def test_bad_values_are_named(sampling, message):
    with pytest.raises(UserError, match=message):
        sampling.validate(V)


@pytest.mark.parametrize("k, drawn", [(1, {1}), (2, {1, 2}), (3, {0, 1, 2}), (4, {0, 1, 2, 3})])
def test_of_equally_probable_tokens_the_first_k_are_drawn(k, drawn):
    logits = jnp.array([[1.0, 3.0, 3.0, 1.0]])
    keys = jax.random.split(jax.random.key(0), 300)
    draws = jax.vmap(lambda key: draw(logits, Sampling(top_k=k), key))(keys)
    assert set(np.asarray(draws).ravel().tolist()) == drawn


def test_top_k_leaves_out_what_may_not_be_drawn():
    logits = jnp.array([[3.0, 3.0, 2.0, 2.0, 1.0]])
    allowed = jnp.array([False, True, False, True, True])
    keys = jax.random.split(jax.random.key(0), 300)
    draws = jax.vmap(lambda key: draw(logits, Sampling(top_k=2), key, allowed))(keys)
    assert set(np.asarray(draws).ravel().tolist()) == {1, 3}
