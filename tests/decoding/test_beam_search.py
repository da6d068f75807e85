import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.decoding.beam_search import Beams, beam_search
from moe_jax.errors import UserError

PAD, BEGIN, END = 0, 1, 2
B, V, N = 3, 6, 3
# The next token depends on the last two, so that a cache of the wrong row would show.
LOGITS = (2 * jax.random.normal(jax.random.key(0), (B, V, V, V))).at[..., END].add(1.0)
ALLOWED = np.array([False, False, True, True, True, True])


def markov(width):
    sequence = jnp.repeat(jnp.arange(B), width)

    def step(last, before):
        return LOGITS[sequence, before, last], last

    def select(cache, parent):
        return jnp.take_along_axis(cache.reshape(B, width), parent, axis=1).reshape(-1)

    return step, select, jnp.zeros(B * width, jnp.int32)


def search(beams, new_tokens=N):
    step, select, cache = markov(beams.count)
    tokens, scores = jax.jit(
        lambda: beam_search(
            step, select, cache, B, new_tokens, beams,
            begin=BEGIN, ends=(END,), pad=PAD, allowed=ALLOWED,
        )
    )()  # fmt: skip
    return np.asarray(tokens), np.asarray(scores)


def all_sequences(row, alpha):
    """Every sequence of up to N tokens with its score, best first: a loop."""
    logits = np.where(ALLOWED, np.asarray(LOGITS[row]), -np.inf)
    found = {}
    for draws in itertools.product(range(V), repeat=N):
        tokens = draws[: draws.index(END) + 1] if END in draws else draws
        total, before, last = 0.0, 0, BEGIN
        for token in tokens:
            exps = np.exp(logits[before, last])
            with np.errstate(divide="ignore"):
                total += np.log(exps[token] / exps.sum())
            before, last = last, token
        if np.isfinite(total):
            found[tokens] = total / ((5 + len(tokens)) / 6) ** alpha
    return sorted(found.items(), key=lambda item: -item[1])


@pytest.mark.parametrize("alpha", [0.0, 0.6, 3.0])
def test_enough_beams_find_what_a_loop_over_all_sequences_finds(alpha):
    # END, 3 words then END, ..., or 3 words: 1 + 3 + 9 * 4 = 40 sequences of up to 3 tokens.
    tokens, scores = search(Beams(41, alpha))
    for row in range(B):
        expected = all_sequences(row, alpha)
        assert len(expected) == 40
        for (sequence, score), found, found_score in zip(
            expected, tokens[row], scores[row], strict=False
        ):
            assert tuple(found) == sequence + (PAD,) * (N - len(sequence))
            assert found_score == pytest.approx(score, abs=1e-5)
        assert scores[row, 40] == -np.inf


def test_one_beam_is_greedy():
    tokens, _ = search(Beams(1, 0.6), new_tokens=8)
    logits = np.where(ALLOWED, np.asarray(LOGITS), -np.inf)
    ends = 0
    for row in range(B):
        before, last, expected = 0, BEGIN, []
        while last != END and len(expected) < 8:
            before, last = last, int(logits[row, before, last].argmax())
            expected.append(last)
        ends += last == END
        assert tokens[row, 0].tolist() == expected + [PAD] * (8 - len(expected))
    assert ends  # Some row ended before the others.


def test_a_higher_penalty_prefers_longer_sequences():
    def lengths(alpha):
        return (search(Beams(41, alpha))[0][:, 0] != PAD).sum(axis=1)

    assert lengths(3.0).sum() > lengths(0.0).sum()


def test_values_that_cannot_work_are_refused():
    with pytest.raises(UserError, match=r"beams is 0; it must be at least 1, which is greedy"):
        Beams(0).validate()
    with pytest.raises(UserError, match=r"length_penalty is -1; it must be at least 0"):
        Beams(1, -1).validate()
