"""Beam search with any model that predicts one token at a time.

Axis letters: B batch, W beams, R = B * W rows, N new tokens, V vocabulary.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.errors import UserError

# The next token's logits [R, V] after the tokens [R] int32, and the cache that has seen these.
Step = Callable[[jax.Array, Any], tuple[jax.Array, Any]]
# The cache whose hypothesis w of sequence b is hypothesis parent[b, w] of this one; [B, W] int32.
Select = Callable[[Any, jax.Array], Any]


@dataclasses.dataclass(frozen=True)
class Beams:
    """How the most probable sequence is searched for.

    Attributes:
      count: W, hypotheses kept of each sequence; 1 is greedy.
      length_penalty: alpha of `length_penalty` (T5 and GNMT: 0.6); 0 compares log-probabilities.
    """

    count: int = 4
    length_penalty: float = 0.6

    def validate(self) -> None:
        """Raises UserError for values that cannot be searched with."""
        if self.count < 1:
            raise UserError(f"beams is {self.count}; it must be at least 1, which is greedy.")
        if not self.length_penalty >= 0:
            raise UserError(f"length_penalty is {self.length_penalty}; it must be at least 0.")


def length_penalty(length: jax.Array, alpha: float) -> jax.Array:
    """((5 + length) / 6)^alpha, which divides log-probabilities (Wu et al. 2016, eq. 14)."""
    return ((5 + length) / 6) ** alpha


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Hypotheses:
    """The W best beginnings of each sequence so far, best first.

    Attributes:
      tokens: [B, W, N] int32, `pad` after the end.
      log_probability: [B, W] float32; -inf where there are fewer than W.
      length: [B, W] int32, the end included.
      ended: [B, W] bool.
    """

    tokens: jax.Array
    log_probability: jax.Array
    length: jax.Array
    ended: jax.Array

    def scores(self, alpha: float) -> jax.Array:
        """[B, W] float32."""
        return self.log_probability / length_penalty(self.length, alpha)


def beam_search(
    step: Step,
    select: Select,
    cache: Any,
    batch: int,
    new_tokens: int,
    beams: Beams,
    *,
    begin: int,
    ends: Sequence[int],
    pad: int,
    allowed: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The W best sequences that the search meets.

    A hypothesis that has ended keeps its place as long as its score is among the W best (unlike in
    searches that collect ended hypotheses besides), so that one beam is greedy decoding and enough
    beams find the best of all sequences. The search stops when all hypotheses have ended.

    Args:
      step: the model, of R rows; row b * W + w is hypothesis w of sequence b.
      select: of its cache.
      cache: of R rows that have seen nothing yet.
      batch: B.
      new_tokens: N; hypotheses that have not ended by then are cut off.
      beams: W and alpha.
      begin, pad: vocabulary ids: what comes before the first token, filling.
      ends: vocabulary ids, each of which is a last token.
      allowed: [V] bool, ids that may follow; None for all.

    Returns:
      [B, W, N] int32 sequences, best first, the end included and `pad` after it, and their scores
      [B, W] float32, -inf for places that no sequence of N tokens can fill.
    """
    width, alpha = beams.count, beams.length_penalty
    start = _Hypotheses(
        jnp.full((batch, width, new_tokens), pad, jnp.int32),
        # All hypotheses begin alike: only the first may be continued, or they would stay alike.
        jnp.full((batch, width), -jnp.inf).at[:, 0].set(0.0),
        jnp.zeros((batch, width), jnp.int32),
        jnp.zeros((batch, width), bool),
    )
    last = jnp.full((batch * width,), begin, jnp.int32)

    def unfinished(carry: tuple) -> jax.Array:
        index, _, hypotheses, _ = carry
        return (index < new_tokens) & ~hypotheses.ended.all()

    def extend(carry: tuple) -> tuple:
        index, last, old, cache = carry
        logits, cache = step(last, cache)
        if allowed is not None:
            logits = jnp.where(allowed, logits, -jnp.inf)
        vocabulary = logits.shape[-1]
        added = jax.nn.log_softmax(logits.astype(jnp.float32)).reshape(batch, width, vocabulary)
        # What has ended has one continuation, at no cost.
        only_pad = jnp.where(jnp.arange(vocabulary) == pad, 0.0, -jnp.inf)
        added = jnp.where(old.ended[:, :, None], only_pad, added)
        total = old.log_probability[:, :, None] + added
        length = old.length + ~old.ended
        scores = total / length_penalty(length, alpha)[:, :, None]
        _, best = jax.lax.top_k(scores.reshape(batch, width * vocabulary), width)
        parent, token = best // vocabulary, best % vocabulary

        def of_parent(a: jax.Array) -> jax.Array:
            return jnp.take_along_axis(a, parent, axis=1)

        tokens = jnp.take_along_axis(old.tokens, parent[:, :, None], axis=1)
        new = _Hypotheses(
            tokens.at[:, :, index].set(token),
            jnp.take_along_axis(total.reshape(batch, width * vocabulary), best, axis=1),
            of_parent(length),
            of_parent(old.ended) | jnp.isin(token, jnp.array(ends)),
        )
        return index + 1, token.reshape(-1), new, select(cache, parent)

    _, _, found, _ = jax.lax.while_loop(
        unfinished, extend, (jnp.zeros((), jnp.int32), last, start, cache)
    )
    return found.tokens, found.scores(alpha)
