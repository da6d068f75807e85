"""A language model: embedding, trunk, logits; and what all models of token sequences do alike.

Axis letters: B batch, L length, M cache length, d width, V vocabulary.
"""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.errors import UserError
from moe_jax.layers.attention import CacheView
from moe_jax.layers.embedding import LearnedPositions, TokenEmbedding
from moe_jax.layers.mode import Mode
from moe_jax.layers.moe import MoEConfig, MoEReport, TokenInfo
from moe_jax.models.blocks import Pass
from moe_jax.models.interface import ModelConfig
from moe_jax.parallel.sharding import constrain


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """What decoding remembers.

    Attributes:
      trunk: what the trunk remembers: a `StackCache`, or the states of LSTMs.
      filled: [B, M] bool, cache positions that hold a real token.
      start: [] int32, next cache position.
    """

    trunk: Any
    filled: jax.Array
    start: jax.Array

    @classmethod
    def empty(cls, trunk: Any, batch: int, length: int) -> "Cache":
        """A cache of M positions for B rows, none of them filled."""
        return cls(trunk, jnp.zeros((batch, length), bool), jnp.zeros((), jnp.int32))

    @property
    def lengths(self) -> jax.Array:
        """[B] int32, real tokens so far."""
        return self.filled.sum(axis=1, dtype=jnp.int32)

    def view(self, mask: jax.Array) -> CacheView:
        """For a call with tokens of which [B, L] bool are real."""
        filled = jax.lax.dynamic_update_slice_in_dim(self.filled, mask, self.start, axis=1)
        return CacheView(self.start, filled)


class LanguageModel(nnx.Module):
    """Embedding, trunk and logits; a family adds its trunk.

    Attributes:
      config: the family's, with `max_length`, `dtype` and `dropout`.
      tokens: embedding and output layer.
      positions: learned vectors of absolute positions, or None.
    """

    def __init__(
        self,
        config: ModelConfig,
        tokens: TokenEmbedding,
        positions: LearnedPositions | None = None,
    ) -> None:
        self.config: Any = nnx.static(config)
        self.tokens = tokens
        self.positions = positions

    @abc.abstractmethod
    def trunk(
        self, x: jax.Array, this_pass: Pass, cache: Any
    ) -> tuple[jax.Array, list[MoEReport], Any]:
        """Everything between embedding and logits.

        Args:
          x: [B, L, d] in the compute dtype.
          this_pass: see `Pass`; place 0 of its key is the embedding's, the others are free.
          cache: what the trunk remembers of earlier calls; None without a cache.

        Returns:
          [B, L, d]; the reports as of `__call__`; what it remembers now.
        """

    @abc.abstractmethod
    def empty_trunk_cache(self, batch: int, length: int) -> Any:
        """What the trunk remembers before the first of up to `length` tokens of `batch` rows."""

    def __call__(
        self,
        tokens: jax.Array,
        mask: jax.Array | None,
        mode: Mode,
        key: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> tuple[jax.Array, list[MoEReport], Cache | None]:
        """Predicts the next token everywhere (a bidirectional model: the masked ones).

        Args:
          tokens: [B, L] int32.
          mask: [B, L] bool, False for padding, which may be on either side; None for none.
          mode: what the pass is for.
          key: PRNG key of this step; None where nothing is random.
          cache: of earlier calls; the tokens continue where it stands.

        Returns:
          logits [B, L, V] float32; the MoE layers' reports, each with a leading axis over its layers
          (none for a dense model); the cache after this call (None if there was none).

        Raises:
          UserError: the sequence is longer than `max_length`.
        """
        config = self.config
        check_length(tokens.shape[1], config.max_length)
        this_pass = start_pass(tokens, mask, mode, key, cache)
        dtype = jnp.dtype(config.dtype)
        x = embed(self.tokens, this_pass, dtype, config.dropout, self.positions)
        x, reports, trunk = self.trunk(x, this_pass, None if cache is None else cache.trunk)
        return self.tokens.logits(x), reports, cache_after(this_pass, trunk)

    def empty_cache(self, batch: int, length: int) -> Cache:
        """A cache for `batch` sequences of up to `length` tokens, padding included.

        Raises:
          UserError: `length` is above `max_length`.
        """
        check_length(length, self.config.max_length)
        return Cache.empty(self.empty_trunk_cache(batch, length), batch, length)


def start_pass(
    tokens: jax.Array,
    mask: jax.Array | None,
    mode: Mode,
    key: jax.Array | None,
    cache: Cache | None = None,
    memory: jax.Array | None = None,
    memory_mask: jax.Array | None = None,
) -> Pass:
    """A pass over tokens [B, L], which continue where the cache stands; see `Pass` for the others."""
    real = jnp.ones(tokens.shape, bool) if mask is None else mask
    info = token_info(tokens, real, None if cache is None else cache.lengths)
    view = None if cache is None else cache.view(real)
    return Pass(info, mode, key, mask, view, memory, memory_mask)


def cache_after(this_pass: Pass, trunk: Any) -> Cache | None:
    """The cache after a pass with which the trunk remembers `trunk`; None if there was none."""
    view = this_pass.view
    if view is None:
        return None
    return Cache(trunk, view.filled, view.start + this_pass.info.mask.shape[1])


def embed(
    table: TokenEmbedding,
    this_pass: Pass,
    dtype: jnp.dtype,
    dropout_rate: float,
    positions: LearnedPositions | None = None,
) -> jax.Array:
    """Vectors of the tokens of a pass, with dropout: [B, L, d] in `dtype`.

    The draw is that of place 0; a model gives its trunk other places.
    """
    info = this_pass.info
    x = table(info.token_ids, dtype)
    if positions is not None:
        x = x + positions(info.positions, dtype)
    return this_pass.dropout(constrain(x, "batch", "length", "width"), dropout_rate, 0)


def token_info(tokens: jax.Array, mask: jax.Array, before: jax.Array | None = None) -> TokenInfo:
    """Positions count real tokens only, so that left padding changes nothing.

    Args:
      tokens: [B, L] int32.
      mask: [B, L] bool, False for padding.
      before: [B] int32, real tokens before these; None for none.
    """
    earlier = 0 if before is None else before[:, None]
    positions = jnp.maximum(earlier + jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
    rows = jnp.arange(tokens.shape[0], dtype=jnp.int32)[:, None]
    return TokenInfo(mask, tokens, positions, jnp.broadcast_to(rows, tokens.shape))


def check_length(length: int, max_length: int) -> None:
    """Raises UserError for a sequence that is too long."""
    if length > max_length:
        raise UserError(
            f"model.max_length is {max_length}, but a sequence has {length} tokens; raise it or "
            "shorten the sequence."
        )


def check_no_leak(settings: Sequence[MoEConfig], field: str, remedies: str = "") -> None:
    """Raises UserError for a router that shows a decoder later tokens.

    Args:
      settings: of the decoder's MoEs.
      field: what the error calls the router, such as `model.moe.router`.
      remedies: further ones than another router, as a clause that begins with a comma.
    """
    for moe in settings:
        if moe.router.leak:
            raise UserError(
                f"{field} is {type(moe.router).__name__}, with which a decoder would look ahead: "
                f"{moe.router.leak}; use a causal router or priority order{remedies}."
            )
