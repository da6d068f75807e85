"""Language model of one stack of blocks.

Axis letters: B batch, L length, d width, V vocabulary.
"""

import dataclasses

import jax

from moe_jax.component import field
from moe_jax.errors import UserError
from moe_jax.layers.embedding import EmbeddingScaling, LearnedPositions, TokenEmbedding, check_tied
from moe_jax.layers.mode import Mode
from moe_jax.layers.moe import MoEReport
from moe_jax.layers.normalization import make_norm
from moe_jax.models.blocks import Pass
from moe_jax.models.interface import ModelConfig
from moe_jax.models.language_model import LanguageModel, check_no_leak
from moe_jax.models.stack import Stack, StackCache, StackConfig


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
        if not self.bidirectional and not self.accept_leak:
            remedies = f", a bidirectional model, or accept it with {path}.accept_leak=true"
            check_no_leak(self.moe_settings, f"{path}.moe.router", remedies)

    def build(self, key: jax.Array) -> "DecoderLM":
        """Creates the model with freshly drawn parameters."""
        return DecoderLM(self, key)


class DecoderLM(LanguageModel):
    """The language model whose trunk is a stack of blocks and a norm.

    Attributes:
      stack: the blocks.
      norm: of what the last one gives.
    """

    def __init__(self, config: DecoderLMConfig, key: jax.Array) -> None:
        token_key, stack_key = jax.random.split(key)
        width = config.width
        tokens = TokenEmbedding(
            config.vocab_size,
            width,
            config.scale if config.init_deviation else 1.0,
            token_key,
            tied=config.tied,
            scaling=config.embedding_scaling,
        )
        position_key = jax.random.fold_in(token_key, 2)
        positions = (
            LearnedPositions(config.max_length, width, position_key)
            if config.learned_positions
            else None
        )
        super().__init__(config, tokens, positions)
        self.stack = Stack(config, stack_key, causal=not config.bidirectional)
        self.norm = make_norm(config.norm, width, config.norm_epsilon)

    def trunk(
        self, x: jax.Array, this_pass: Pass, cache: StackCache | None
    ) -> tuple[jax.Array, list[MoEReport], StackCache | None]:
        """See `LanguageModel`; there is a report for each stage of the stack that has MoEs.

        Raises:
          UserError: a bidirectional model is to generate.
        """
        if self.config.bidirectional and this_pass.mode == Mode.DECODE:
            raise UserError(
                "model.bidirectional is true, and such a model cannot generate token by token; use "
                "a causal one."
            )
        x, reports, cache = self.stack(x, this_pass.fold(1), cache)
        return self.norm(x), reports, cache

    def empty_trunk_cache(self, batch: int, length: int) -> StackCache:
        """See `LanguageModel`."""
        return self.stack.empty_cache(batch, length)
