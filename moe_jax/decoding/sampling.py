"""Autoregressive sampling with a key-value cache.

Axis letters: B batch, L prompt length, N new tokens, V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.errors import UserError
from moe_jax.layers.mode import Mode
from moe_jax.models.language_model import LanguageModel


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
      temperature: divides the logits; 0 takes the most probable token.
      top_k: only the k most probable tokens are drawn, of equally probable ones the first; 0 for
        all.
    """

    temperature: float = 1.0
    top_k: int = 0

    def validate(self, vocab_size: int) -> None:
        """Raises UserError for values that cannot be sampled with."""
        if not self.temperature >= 0:
            raise UserError(f"temperature is {self.temperature}; it must be at least 0.")
        if not 0 <= self.top_k <= vocab_size:
            raise UserError(f"top_k is {self.top_k}; it must be from 0 (all) to {vocab_size}.")


def left_padded(prompts: list[np.ndarray], pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Stacks prompts so that all end at the same place.

    Returns:
      tokens [B, L] int32, and mask [B, L] bool, False for padding.
    """
    length = max(len(prompt) for prompt in prompts)
    tokens = np.full((len(prompts), length), pad, np.int32)
    mask = np.zeros((len(prompts), length), bool)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = prompt
        mask[row, length - len(prompt) :] = True
    return tokens, mask


def draw(
    logits: jax.Array, sampling: Sampling, key: jax.Array, allowed: jax.Array | None = None
) -> jax.Array:
    """Draws from logits [B, V]; [B] int32. A row's draw depends on its index and the key.

    `allowed` [V] bool leaves out ids that are never to be drawn; None allows all.
    """
    if allowed is not None:
        logits = jnp.where(allowed, logits, -jnp.inf)
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if sampling.top_k:
        # By place, because the k-th may be as probable as others.
        places = jax.lax.top_k(logits, sampling.top_k)[1]
        rows = jnp.arange(logits.shape[0])[:, None]
        kept = jnp.zeros(logits.shape, bool).at[rows, places].set(True)
        logits = jnp.where(kept, logits, -jnp.inf)
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(logits.shape[0]))
    drawn = jax.vmap(jax.random.categorical)(keys, logits / sampling.temperature)
    return drawn.astype(jnp.int32)


def generate(
    model: LanguageModel,
    tokens: jax.Array,
    mask: jax.Array,
    key: jax.Array,
    new_tokens: int,
    sampling: Sampling,
    allowed: jax.Array | None = None,
) -> jax.Array:
    """Continues prompts; jit-able with `new_tokens` and `sampling` static.

    Args:
      model: the model.
      tokens: [B, L] int32 left-padded prompts.
      mask: [B, L] bool, False for padding.
      key: PRNG key of the draws.
      new_tokens: N, at least 1.
      sampling: how to draw.
      allowed: [V] bool, ids that may be drawn; None for all.

    Returns:
      [B, N] int32.
    """
    # The last token is drawn and never fed back, so it needs no place in the cache.
    empty = model.empty_cache(tokens.shape[0], tokens.shape[1] + new_tokens - 1)
    logits, _, cache = model(tokens, mask, Mode.DECODE, cache=empty)
    first = draw(logits[:, -1], sampling, jax.random.fold_in(key, 0), allowed)

    def step(carry: tuple, index: jax.Array) -> tuple[tuple, jax.Array]:
        token, cache = carry
        real = jnp.ones((token.shape[0], 1), bool)
        logits, _, cache = model(token[:, None], real, Mode.DECODE, cache=cache)
        token = draw(logits[:, -1], sampling, jax.random.fold_in(key, index), allowed)
        return (token, cache), token

    _, rest = jax.lax.scan(step, (first, cache), jnp.arange(1, new_tokens))
    return jnp.concatenate([first[:, None], rest.T], axis=1)
