"""Translation by LSTMs with attention and two Mixtures-of-Experts (Shazeer et al. 2017, App. E and G).

Axis letters: B batch, M source length, L target length, d width, u units, n attention width,
f expert width, V vocabulary.

A GNMT (Wu et al. 2016) cut to three LSTMs in the encoder, of which the first two read the source in
both directions, and two in the decoder. A MoE stands after the first pair and between the latter two.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.component import field
from moe_jax.errors import UserError
from moe_jax.layers.embedding import EmbeddingScaling, TokenEmbedding
from moe_jax.layers.initializers import scaled_truncated_normal
from moe_jax.layers.lstm import LSTM, LSTMState
from moe_jax.layers.mode import Mode
from moe_jax.layers.moe import MoEConfig, MoEReport
from moe_jax.models.language_model import Cache, cache_after, embed, start_pass
from moe_jax.models.recurrent_lm import RecurrentConfig, SigmoidMoE
from moe_jax.parallel.sharding import constrain
from moe_jax.routing.noisy_top_k import NoisyTopK


def _moe() -> MoEConfig:
    return MoEConfig(router=NoisyTopK(importance_weight=0.01, load_weight=0.01))


@dataclasses.dataclass
class RecurrentTranslatorConfig(RecurrentConfig):
    """A recurrent encoder and decoder, with equal MoEs in both; source and target have own tables.

    Attributes:
      attention_width: n of the attention function.

    The other attributes are `RecurrentConfig`'s.
    """

    attention_width: int = field(128, at_least=1)
    moe: MoEConfig = dataclasses.field(default_factory=_moe)

    @property
    def output_vocab_size(self) -> int:
        """V of the targets."""
        return self.vocab_size

    @property
    def moe_layers(self) -> list[str]:
        """The MoE is layer 1 of the encoder and of the decoder."""
        return ["encoder/1", "decoder/1"] if self.sparse else []

    def build(self, key: jax.Array) -> "RecurrentTranslator":
        """Creates the model with freshly drawn parameters."""
        return RecurrentTranslator(self, key)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Memory:
    """What attention reads.

    Attributes:
      values: [B, M, d] the encoder's output x.
      keys: [B, M, n] V * tanh(x U), see `AttentiveLSTM`.
    """

    values: jax.Array
    keys: jax.Array


class AttentiveLSTM(nnx.Module):
    """An LSTM that also reads, at each step, the part of the memory that its last output asks for.

    The score of memory x_i for output y is sum_n V_n tanh((x_i U)_n) tanh((y W)_n) (eq. 22), and what
    is read is the memory's mean under the softmax of the scores.

    Attributes:
      lstm: of the inputs [B, L, d].
      w_context: [d, 4, u] float32, what its gates read of the context.
      w_memory: [d, n] float32 U.
      w_output: [d, n] float32 W.
      scores: [n] float32 V.
    """

    def __init__(self, config: RecurrentTranslatorConfig, key: jax.Array) -> None:
        width, units, hidden = config.width, config.units, config.attention_width
        scale = config.init_scale
        lstm_key, context_key, memory_key, output_key, score_key = jax.random.split(key, 5)
        self.lstm = LSTM(width, units, width, scale, config.unroll, lstm_key)
        self.w_context = nnx.Param(
            scaled_truncated_normal(context_key, (width, 4, units), 3 * width, scale),
            axes=("embed", "gates", "units"),
        )
        self.w_memory = nnx.Param(
            scaled_truncated_normal(memory_key, (width, hidden), width, scale),
            axes=("embed", "units"),
        )
        self.w_output = nnx.Param(
            scaled_truncated_normal(output_key, (width, hidden), width, scale),
            axes=("embed", "units"),
        )
        self.scores = nnx.Param(
            scaled_truncated_normal(score_key, (hidden,), hidden, scale), axes=("norm",)
        )

    def memory(self, values: jax.Array) -> Memory:
        """Of the encoder's output [B, M, d]; decoding computes it once."""
        projected = jnp.einsum("bmd,dn->bmn", values, self.w_memory[...].astype(values.dtype))
        keys = jnp.tanh(projected) * self.scores[...].astype(values.dtype)
        return Memory(values, constrain(keys, "batch", "length", "units"))

    @jax.named_scope("attentive_lstm")
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array,
        memory: Memory,
        memory_mask: jax.Array,
        state: LSTMState | None,
    ) -> tuple[jax.Array, LSTMState]:
        """Runs over time.

        Args:
          x: [B, L, d].
          mask: [B, L] bool; False for padding, over which the state stays as it is.
          memory: what is attended to.
          memory_mask: [B, M] bool, False for its padding.
          state: before the first token; None for zeros.

        Returns:
          [B, L, d], and the state after the last token.
        """
        dtype = x.dtype
        start = self.lstm.empty_state(x.shape[0], dtype) if state is None else state
        lstm_step = self.lstm.recurrence(dtype)
        w_output = constrain(self.w_output[...].astype(dtype), "width", "units")
        w_context = constrain(self.w_context[...].astype(dtype), "width", "gates", "units")

        def step(
            state: LSTMState, inputs: tuple[jax.Array, jax.Array]
        ) -> tuple[LSTMState, jax.Array]:
            of_x, real = inputs
            query = jnp.tanh(state.output @ w_output)
            scores = jnp.einsum(
                "bn,bmn->bm", query, memory.keys, preferred_element_type=jnp.float32
            )
            # Not -inf, with which a source of padding only would have no mean.
            weights = jax.nn.softmax(jnp.where(memory_mask, scores, -1e9)).astype(dtype)
            context = jnp.einsum("bm,bmd->bd", weights, memory.values)
            of_context = jnp.einsum(
                "bd,dgu->bgu", context, w_context, preferred_element_type=jnp.float32
            )
            state = lstm_step(state, of_x + of_context, real)
            return state, state.output

        end, y = jax.lax.scan(
            step, start, (self.lstm.of_inputs(x), mask.T), unroll=self.lstm.unroll
        )
        return constrain(y.swapaxes(0, 1), "batch", "length", "width"), end


# What the decoder remembers: what its attention reads, and the states of its LSTMs.
DecoderCache = tuple[Memory, list[LSTMState]]


class RecurrentTranslator(nnx.Module):
    """The model; both MoEs are None where the config has none.

    Attributes:
      source: embedding of the source.
      target: embedding of the target, and output layer.
      forward, backward: the encoder's LSTMs that read the source in both directions.
      encoder_moe: after the two.
      encoder: the encoder's last LSTM.
      attentive: the decoder's first LSTM.
      decoder_moe: after it.
      decoder: the decoder's last LSTM.
    """

    def __init__(self, config: RecurrentTranslatorConfig, key: jax.Array) -> None:
        keys = jax.random.split(key, 8)
        self.config = nnx.static(config)
        width, scale = config.width, config.init_scale

        def table(key: jax.Array, tied: bool) -> TokenEmbedding:
            scaling = EmbeddingScaling.INPUTS if tied else EmbeddingScaling.NONE
            return TokenEmbedding(config.vocab_size, width, 1.0, key, tied=tied, scaling=scaling)

        def lstm(key: jax.Array) -> LSTM:
            return LSTM(width, config.units, width, scale, config.unroll, key)

        def moe(key: jax.Array) -> SigmoidMoE | None:
            return SigmoidMoE(config, key) if config.sparse else None

        self.source, self.target = table(keys[0], tied=True), table(keys[1], tied=False)
        self.forward, self.backward, self.encoder = lstm(keys[2]), lstm(keys[3]), lstm(keys[4])
        self.attentive, self.decoder = AttentiveLSTM(config, keys[5]), lstm(keys[6])
        self.encoder_moe, self.decoder_moe = (moe(k) for k in jax.random.split(keys[7]))

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
          logits [B, L, V] float32, and the MoEs' reports, each with a leading axis of one layer, the
          encoder's first.
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
        """Reads the inputs.

        Args:
          inputs: [B, M] int32.
          mask: [B, M] bool, False for padding; None for none.
          mode: what the pass is for.
          key: PRNG key; None where nothing is random.

        Returns:
          [B, M, d], and the report of the MoE.
        """
        config: RecurrentTranslatorConfig = self.config
        this_pass = start_pass(inputs, mask, mode, key)
        mask, rate = this_pass.info.mask, config.dropout
        x = embed(self.source, this_pass, jnp.dtype(config.dtype), rate)
        there, _ = self.forward(x, mask)
        back, _ = self.backward(x, mask, reverse=True)
        x = x + this_pass.dropout(there, rate, 1) + this_pass.dropout(back, rate, 2)
        reports = []
        if self.encoder_moe is not None:
            x, report = self.encoder_moe(x, this_pass.fold(3))
            reports.append(report)
        y, _ = self.encoder(x, mask)
        return x + this_pass.dropout(y, rate, 4), reports

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
        """Predicts the token after each target.

        Args:
          memory: [B, M, d] from `encode`; None with a cache, which has it.
          memory_mask: [B, M] bool, False for the inputs' padding; None for none.
          targets: [B, L] int32.
          mask: [B, L] bool, False for padding; None for none.
          mode: what the pass is for.
          key: PRNG key; None where nothing is random.
          cache: of earlier calls; the targets continue where it stands.

        Returns:
          logits [B, L, V] float32; the MoE's report; the cache after this call (None if there was
          none).

        Raises:
          UserError: there is neither memory nor cache.
        """
        config: RecurrentTranslatorConfig = self.config
        first = last = None
        if cache is not None:
            read, (first, last) = cache.trunk
        elif memory is not None:
            read = self.attentive.memory(memory)
        else:
            raise UserError("decode has neither memory nor cache; give it what encode returned.")
        if memory_mask is None:
            memory_mask = jnp.ones(read.values.shape[:2], bool)
        this_pass = start_pass(targets, mask, mode, key, cache)
        mask, rate = this_pass.info.mask, config.dropout
        x = embed(self.target, this_pass, jnp.dtype(config.dtype), rate)
        y, first = self.attentive(x, mask, read, memory_mask, first)
        x = x + this_pass.dropout(y, rate, 1)
        reports = []
        if self.decoder_moe is not None:
            x, report = self.decoder_moe(x, this_pass.fold(3))
            reports.append(report)
        y, last = self.decoder(x, mask, last)
        x = x + this_pass.dropout(y, rate, 4)
        trunk: DecoderCache = (read, [first, last])
        return self.target.logits(x), reports, cache_after(this_pass, trunk)

    def empty_cache(self, memory: jax.Array, length: int) -> Cache:
        """A cache for up to `length` targets of the inputs behind `memory` [B, M, d]."""
        batch, dtype = memory.shape[0], memory.dtype
        states = [lstm.empty_state(batch, dtype) for lstm in (self.attentive.lstm, self.decoder)]
        trunk: DecoderCache = (self.attentive.memory(memory), states)
        return Cache.empty(trunk, batch, length)
