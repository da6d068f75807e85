"""Encoder and decoder of two stacks, with cross-attention: T5, GShard, Switch, ST-MoE.

Axis letters: B batch, M input length, L target length, d width, V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.component import field
from moe_jax.errors import UserError
from moe_jax.layers.attention import MultiHead, Positions
from moe_jax.layers.embedding import EmbeddingScaling, TokenEmbedding, check_tied
from moe_jax.layers.mode import Mode
from moe_jax.layers.moe import MoEReport
from moe_jax.layers.normalization import make_norm
from moe_jax.models.interface import ModelConfig
from moe_jax.models.language_model import Cache, cache_after, check_no_leak, embed, start_pass
from moe_jax.models.stack import Stack, StackConfig


def _stack() -> StackConfig:
    return StackConfig(attention=MultiHead(positions=Positions.RELATIVE))


@dataclasses.dataclass
class EncoderDecoderConfig(ModelConfig):
    """A text-to-text model.

    Attributes:
      vocab_size: V of the inputs, and of the targets unless these have their own.
      target_vocab_size: V of the targets, which then have an embedding table of their own (GShard);
        0 for one table and vocabulary.
      tied: the output layer is the targets' embedding table.
      embedding_scaling: see `EmbeddingScaling`; T5 v1.0 and Switch Base and Large divide logits by
        sqrt(d).
      accept_leak: let the decoder have a router through which tokens learn of later ones, as GShard's
        do when tokens are dropped. Its loss may then be better than it can generate.
      encoder, decoder: the stacks, of equal width and dtype; all else may differ.
    """

    vocab_size: int = field(264, at_least=1)
    target_vocab_size: int = field(0, at_least=0)
    tied: bool = True
    embedding_scaling: EmbeddingScaling = EmbeddingScaling.LOGITS
    accept_leak: bool = False
    encoder: StackConfig = dataclasses.field(default_factory=_stack)
    decoder: StackConfig = dataclasses.field(default_factory=_stack)

    @property
    def output_vocab_size(self) -> int:
        """V of the targets."""
        return self.target_vocab_size or self.vocab_size

    @property
    def moe_layers(self) -> list[str]:
        """See `ModelConfig`: such as `encoder/1`, by stack and index of the block."""
        return [
            *(f"encoder/{block}" for block in self.encoder.moe_layers),
            *(f"decoder/{block}" for block in self.decoder.moe_layers),
        ]

    def split_dimensions(self, path: str = "model") -> list[tuple[str, int, str]]:
        """See `ModelConfig`."""
        targets = (f"{path}.target_vocab_size", self.target_vocab_size, "model")
        return [
            *self.encoder.split_dimensions(f"{path}.encoder"),
            *self.decoder.split_dimensions(f"{path}.decoder"),
            (f"{path}.vocab_size", self.vocab_size, "model"),
            *([targets] if self.target_vocab_size else []),
        ]

    def validate(self, path: str = "model") -> None:
        """Raises UserError for a model that could not be built; `path` is the config's own."""
        self.check_ranges(path)
        self.encoder.validate(f"{path}.encoder")
        self.decoder.validate(f"{path}.decoder")
        for name in ("width", "dtype"):
            ours, other = getattr(self.decoder, name), getattr(self.encoder, name)
            if ours != other:
                raise UserError(
                    f"{path}.decoder.{name} is {ours}, but {path}.encoder.{name} is {other}, and the "
                    "decoder reads the encoder's output; make them equal."
                )
        check_tied(self.embedding_scaling, self.tied)
        if not self.accept_leak:
            remedies = f", or accept it with {path}.accept_leak=true"
            check_no_leak(self.decoder.moe_settings, f"{path}.decoder.moe.router", remedies)

    def build(self, key: jax.Array) -> "EncoderDecoder":
        """Creates the model with freshly drawn parameters."""
        return EncoderDecoder(self, key)


class EncoderDecoder(nnx.Module):
    """The model.

    Attributes:
      inputs: the inputs' table, and the targets' too where `targets` is None.
      targets: the targets' own table, or None.
      encoder, decoder: the stacks, each with a final norm.
    """

    def __init__(self, config: EncoderDecoderConfig, key: jax.Array) -> None:
        inputs_key, targets_key, encoder_key, decoder_key = jax.random.split(key, 4)
        self.config = nnx.static(config)
        encoder, decoder = config.encoder, config.decoder
        scale = encoder.scale if encoder.init_deviation else 1.0
        own_table = config.target_vocab_size > 0
        self.inputs = TokenEmbedding(
            config.vocab_size,
            encoder.width,
            scale,
            inputs_key,
            tied=config.tied or own_table,
            scaling=config.embedding_scaling,
        )
        self.targets = (
            TokenEmbedding(
                config.target_vocab_size,
                decoder.width,
                scale,
                targets_key,
                tied=config.tied,
                scaling=config.embedding_scaling,
            )
            if own_table
            else None
        )
        self.encoder = Stack(encoder, encoder_key, causal=False)
        self.encoder_norm = make_norm(encoder.norm, encoder.width, encoder.norm_epsilon)
        self.decoder = Stack(decoder, decoder_key, causal=True, cross=True)
        self.decoder_norm = make_norm(decoder.norm, decoder.width, decoder.norm_epsilon)

    def __call__(
        self,
        inputs: jax.Array,
        input_mask: jax.Array | None,
        targets: jax.Array,
        target_mask: jax.Array | None,
        mode: Mode,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, list[MoEReport]]:
        """Predicts every target from the inputs and the targets before it.

        Args:
          inputs: [B, M] int32.
          input_mask: [B, M] bool, False for padding; None for none.
          targets: [B, L] int32, shifted: the first is what a target begins with.
          target_mask: [B, L] bool, False for padding; None for none.
          mode: what the pass is for.
          key: PRNG key of this step; None where nothing is random.

        Returns:
          logits [B, L, V] float32, and the MoE layers' reports: for each stage that has some one with
          a leading axis over its layers, the encoder's first.
        """
        encoder_key, decoder_key = (None,) * 2 if key is None else jax.random.split(key)
        memory, encoder_reports = self.encode(inputs, input_mask, mode, encoder_key)
        logits, decoder_reports, _ = self.decode(
            memory, input_mask, targets, target_mask, mode, decoder_key
        )
        return logits, encoder_reports + decoder_reports

    @jax.named_scope("encoder")
    def encode(
        self,
        inputs: jax.Array,
        mask: jax.Array | None,
        mode: Mode,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, list[MoEReport]]:
        """What the decoder reads: [B, M, d], and reports; arguments as of `__call__`."""
        rate = self.config.encoder.dropout
        this_pass = start_pass(inputs, mask, mode, key)
        x = embed(self.inputs, this_pass, jnp.dtype(self.config.encoder.dtype), rate)
        x, reports, _ = self.encoder(x, this_pass.fold(1))
        return this_pass.dropout(self.encoder_norm(x), rate, 2), reports

    @jax.named_scope("decoder")
    def decode(
        self,
        memory: jax.Array | None,
        memory_mask: jax.Array | None,
        targets: jax.Array,
        mask: jax.Array | None,
        mode: Mode,
        key: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> tuple[jax.Array, list[MoEReport], Cache | None]:
        """Predicts the next target everywhere.

        Args:
          memory: [B, M, d] of `encode`; None with a cache, which has it.
          memory_mask: [B, M] bool, False for padding; None for none.
          targets: [B, L] int32.
          mask: [B, L] bool, False for padding; None for none.
          mode: what the pass is for.
          key: PRNG key of this step; None where nothing is random.
          cache: of earlier calls; the targets continue where it stands.

        Returns:
          logits [B, L, V] float32, reports, and the cache after this call (None if there was none).
        """
        rate = self.config.decoder.dropout
        table = self.inputs if self.targets is None else self.targets
        this_pass = start_pass(targets, mask, mode, key, cache, memory, memory_mask)
        x = embed(table, this_pass, jnp.dtype(self.config.decoder.dtype), rate)
        layers = None if cache is None else cache.trunk
        x, reports, layers = self.decoder(x, this_pass.fold(1), layers)
        logits = table.logits(this_pass.dropout(self.decoder_norm(x), rate, 2))
        return logits, reports, cache_after(this_pass, layers)

    def empty_cache(self, memory: jax.Array, length: int) -> Cache:
        """A cache for up to `length` targets of each row of the memory [B, M, d].

        It has the memory's keys and values of every block, so that decoding computes them once.
        """
        batch = memory.shape[0]
        return Cache.empty(self.decoder.empty_cache(batch, length, memory), batch, length)
