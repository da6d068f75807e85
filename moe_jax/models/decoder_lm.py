"""Language model of one stack of blocks.

Axis letters: B batch, L length, M cache length, d width, V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.component import field
from moe_jax.errors import UserError
from moe_jax.layers.attention import CacheView
from moe_jax.layers.dropout import dropout
from moe_jax.layers.embedding import EmbeddingScaling, LearnedPositions, TokenEmbedding, check_tied
from moe_jax.layers.mode import Mode
from moe_jax.layers.moe import MoEReport
from moe_jax.layers.normalization import make_norm
from moe_jax.models.blocks import Pass
from moe_jax.models.interface import ModelConfig
from moe_jax.models.sequences import check_length, check_no_leak, token_info
from moe_jax.models.stack import Stack, StackCache, StackConfig
from moe_jax.parallel.sharding import constrain


@dataclasses.dataclass
class DecoderLMConfig(StackConfig, ModelConfig):
    """A decoder-only language model, or a bidirectional one for masked-token objectives.

    Attributes:
      vocab_size: V, at least the tokenizer's.
      max_length: longest sequence the model is meant for, in training and decoding.
      tied: the output layer is the embedding table.
      embedding_scaling: see `EmbeddingScaling`.
      learned_positions: add a learned vector for each absolute position (GPT).
      bidirectional: tokens see later ones too; such a model cannot generate.
      accept_leak: let a decoder have a router through which tokens learn of later ones, as GLaM's and
        GShard's do when tokens are dropped. Its loss may then be better than it can generate.

    The other attributes are `StackConfig`'s.
    """

    vocab_size: int = field(264, at_least=1)
    max_length: int = field(256, at_least=1)
    tied: bool = True
    embedding_scaling: EmbeddingScaling = EmbeddingScaling.INPUTS
    learned_positions: bool = False
    bidirectional: bool = False
    accept_leak: bool = False

    def split_dimensions(self, path: str = "model") -> list[tuple[str, int, str]]:
        """See `ModelConfig`."""
        return [*super().split_dimensions(path), (f"{path}.vocab_size", self.vocab_size, "model")]

    def validate(self, path: str = "model") -> None:
        """Raises UserError for a model that could not be built."""
        super().validate(path)
        check_tied(self.embedding_scaling, self.tied)
        if self.sparse and not self.bidirectional and not self.accept_leak:
            remedies = f", a bidirectional model, or accept it with {path}.accept_leak=true"
            for moe in self.moe_settings:
                check_no_leak(moe.router, f"{path}.moe.router", remedies)

    def build(self, key: jax.Array) -> "DecoderLM":
        """Creates the model with freshly drawn parameters."""
        return DecoderLM(self, key)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """What decoding remembers.

    Attributes:
      stack: the blocks'.
      filled: [B, M] bool, cache positions that hold a real token.
      start: [] int32, next cache position.
    """

    stack: StackCache
    filled: jax.Array
    start: jax.Array

    @classmethod
    def of(cls, stack: StackCache, batch: int, length: int) -> "Cache":
        """Nothing filled yet: B rows of M positions."""
        return cls(stack, jnp.zeros((batch, length), bool), jnp.zeros((), jnp.int32))

    @property
    def lengths(self) -> jax.Array:
        """[B] int32, real tokens so far."""
        return self.filled.sum(axis=1, dtype=jnp.int32)

    def view(self, mask: jax.Array) -> CacheView:
        """For a call with tokens of which [B, L] bool are real."""
        filled = jax.lax.dynamic_update_slice_in_dim(self.filled, mask, self.start, axis=1)
        return CacheView(self.start, filled)

    def after(self, stack: StackCache, view: CacheView, length: int) -> "Cache":
        """After a call with L tokens."""
        return Cache(stack, view.filled, self.start + length)


class DecoderLM(nnx.Module):
    """The language model."""

    def __init__(self, config: DecoderLMConfig, key: jax.Array) -> None:
        token_key, stack_key = jax.random.split(key)
        self.config = nnx.static(config)
        self.tokens = TokenEmbedding(
            config.vocab_size,
            config.width,
            config.scale if config.init_deviation else 1.0,
            token_key,
            tied=config.tied,
            scaling=config.embedding_scaling,
        )
        position_key = jax.random.fold_in(token_key, 2)
        self.positions = (
            LearnedPositions(config.max_length, config.width, position_key)
            if config.learned_positions
            else None
        )
        self.stack = Stack(config, stack_key, causal=not config.bidirectional)
        self.norm = make_norm(config.norm, config.width, config.norm_epsilon)

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
          logits [B, L, V] float32; the MoE layers' reports, one for each stage that has some, with a
          leading axis over its layers (none for a dense model); the cache after this call (None if
          there was none).

        Raises:
          UserError: the sequence is longer than `max_length`.
        """
        config: DecoderLMConfig = self.config
        dtype = jnp.dtype(config.dtype)
        length = tokens.shape[1] if cache is None else cache.filled.shape[1]
        check_length(length, config.max_length)
        if config.bidirectional and mode == Mode.DECODE:
            raise UserError(
                "model.bidirectional is true, and such a model cannot generate token by token; use "
                "a causal one."
            )
        padding = mask
        mask = jnp.ones(tokens.shape, bool) if mask is None else mask
        info = token_info(tokens, mask, None if cache is None else cache.lengths)
        view = None if cache is None else cache.view(mask)
        embed_key, stack_key = (None,) * 2 if key is None else jax.random.split(key)

        x = self.tokens(tokens, dtype)
        if self.positions is not None:
            x = x + self.positions(info.positions, dtype)
        x = dropout(constrain(x, "batch", "length", "width"), config.dropout, embed_key)
        this_pass = Pass(info, mode, stack_key, padding, view)
        x, reports, layers = self.stack(x, this_pass, None if cache is None else cache.stack)
        if cache is not None and view is not None and layers is not None:
            cache = cache.after(layers, view, tokens.shape[1])
        return self.tokens.logits(self.norm(x)), reports, cache

    def empty_cache(self, batch: int, length: int) -> Cache:
        """A cache for `batch` sequences of up to `length` tokens, padding included."""
        return Cache.of(self.stack.empty_cache(batch, length), batch, length)
