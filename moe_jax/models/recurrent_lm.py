"""Language model of LSTMs with a Mixture-of-Experts after the first (Shazeer et al. 2017, App. C.1).

Axis letters: B batch, L length, d width, f expert width, V vocabulary.

Every layer's output goes through dropout and is added to its input; that of the MoE goes through a
sigmoid before. The MoE sees all time steps at once.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.component import field
from moe_jax.errors import UserError
from moe_jax.layers.dropout import dropout
from moe_jax.layers.embedding import EmbeddingScaling, TokenEmbedding
from moe_jax.layers.initializers import scaled_truncated_normal
from moe_jax.layers.lstm import LSTM, LSTMState
from moe_jax.layers.mode import Mode
from moe_jax.layers.moe import MoE, MoEConfig, MoEReport, RouterState
from moe_jax.models.blocks import Pass
from moe_jax.models.interface import ModelConfig
from moe_jax.models.language_model import LanguageModel, check_no_leak
from moe_jax.models.stack import MOST_LAYERS, ComputeDtype
from moe_jax.parallel.sharding import constrain
from moe_jax.routing.noisy_top_k import NoisyTopK


@dataclasses.dataclass
class RecurrentConfig(ModelConfig):
    """What the models of LSTMs have in common: their layers, and a kind of MoE between two of them.

    Attributes:
      vocab_size: V, at least the tokenizer's.
      width: d, of embeddings and of the inputs and outputs of all layers.
      units: of each LSTM; where they are not `width`, its output is projected to `width`.
      num_experts: E of each MoE; 0 for no MoE.
      mlp_width: f of each expert.
      moe: how tokens are routed.
      dropout: rate on the outputs of embeddings and of every layer.
      init_scale: s of the truncated normal with variance s / fan_in.
      dtype: compute dtype; cells stay float32.
      remat_moe: recompute what is inside a MoE in the backward pass (appendix D).
      unroll: unroll the loops over time (longer compilation; exact FLOP counts by XLA).
    """

    vocab_size: int = field(264, at_least=1)
    width: int = field(128, at_least=1)
    units: int = field(128, at_least=1)
    num_experts: int = field(8, at_least=0)
    mlp_width: int = field(256, at_least=1)
    moe: MoEConfig = dataclasses.field(default_factory=lambda: MoEConfig(router=NoisyTopK()))
    dropout: float = field(0.0, at_least=0, below=1)
    init_scale: float = field(1.0, above=0)
    dtype: ComputeDtype = ComputeDtype.FLOAT32
    remat_moe: bool = False
    unroll: bool = False

    @property
    def sparse(self) -> bool:
        """Whether there is a MoE."""
        return self.num_experts > 0

    @property
    def moe_settings(self) -> list[MoEConfig]:
        """The settings that some MoE has, each once."""
        return [self.moe] if self.sparse else []

    @property
    def experts_of_layers(self) -> list[int]:
        """Number of experts of each MoE layer."""
        return [self.num_experts] * len(self.moe_layers)

    def split_dimensions(self) -> list[tuple[str, int, str]]:
        """See `ModelConfig`."""
        of_moe = [
            ("model.mlp_width", self.mlp_width, "model"),
            ("model.num_experts", self.num_experts, "expert"),
        ]
        return [("model.vocab_size", self.vocab_size, "model"), *(of_moe if self.sparse else [])]

    def validate(self) -> None:
        """Raises UserError for a model that could not be built."""
        self.check_ranges("model")
        for moe in self.moe_settings:
            moe.validate(self.num_experts, "model.moe")
        check_no_leak(self.moe_settings, "model.moe.router")


@dataclasses.dataclass
class RecurrentLMConfig(RecurrentConfig):
    """LSTM layers with a MoE, or a dense network in its place, between the first and the second.

    Attributes:
      max_length: longest sequence the model is meant for, in training and decoding.
      num_lstms: number of LSTM layers.
      hidden_widths: of the hidden layers of a dense ReLU network in the place of the MoE (MoE-1-Wide:
        4096; MoE-1-Deep: four of 1024); empty for none.
      tied: the output layer is the embedding table.

    The other attributes are `RecurrentConfig`'s.
    """

    max_length: int = field(256, at_least=1)
    num_lstms: int = field(2, at_least=1, at_most=MOST_LAYERS)
    hidden_widths: tuple[int, ...] = ()
    tied: bool = False

    @property
    def moe_layers(self) -> list[int]:
        """The MoE is layer 1, after the LSTM that is layer 0."""
        return [1] if self.sparse else []

    def split_dimensions(self) -> list[tuple[str, int, str]]:
        """See `ModelConfig`."""
        of_dense = [("model.hidden_widths", width, "model") for width in self.hidden_widths]
        return [*super().split_dimensions(), *of_dense]

    def validate(self) -> None:
        """Raises UserError for a model that could not be built."""
        super().validate()
        if min(self.hidden_widths, default=1) < 1:
            raise UserError(
                f"model.hidden_widths is {self.hidden_widths}; every width must be at least 1."
            )
        if self.hidden_widths and self.sparse:
            raise UserError(
                f"model.hidden_widths is {self.hidden_widths}, a network in the place of the MoE, but "
                f"model.num_experts is {self.num_experts}; set it to 0, or leave hidden_widths empty."
            )

    def build(self, key: jax.Array) -> "RecurrentLM":
        """Creates the model with freshly drawn parameters."""
        return RecurrentLM(self, key)


class ReLUNetwork(nnx.Module):
    """Hidden ReLU layers and a linear one, without biases.

    Attributes:
      weights: of each layer, [inputs, outputs] float32.
    """

    def __init__(
        self, width: int, hidden_widths: tuple[int, ...], scale: float, key: jax.Array
    ) -> None:
        sizes = list(itertools.pairwise((width, *hidden_widths, width)))
        keys = jax.random.split(key, len(sizes))
        self.weights = nnx.List(
            nnx.Param(
                scaled_truncated_normal(k, shape, shape[0], scale),
                axes=("mlp", "embed") if i == len(hidden_widths) else ("embed", "mlp"),
            )
            for i, (k, shape) in enumerate(zip(keys, sizes, strict=True))
        )

    @jax.named_scope("feed_forward")
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, L, d] to [B, L, d]."""
        *hidden, last = (w[...].astype(x.dtype) for w in self.weights)
        for w in hidden:
            x = constrain(jax.nn.relu(x @ w), "batch", "length", "mlp")
        return x @ last


class SigmoidMoE(nnx.Module):
    """x + dropout(sigmoid(MoE(x))).

    Attributes:
      moe: the MoE.
    """

    def __init__(self, config: RecurrentConfig, key: jax.Array) -> None:
        self.moe = MoE(
            config.moe,
            config.width,
            config.mlp_width,
            config.num_experts,
            config.init_scale,
            key,
        )
        self.dropout_rate, self.remat = config.dropout, config.remat_moe

    @jax.named_scope("moe")
    def __call__(self, x: jax.Array, this_pass: Pass) -> tuple[jax.Array, MoEReport]:
        """[B, L, d] to [B, L, d], and the report with a leading axis of one layer."""
        moe_key, out_key = this_pass.keys(2)
        definition, values = nnx.split(self.moe)

        def run(values: nnx.State, x: jax.Array) -> tuple[jax.Array, MoEReport, nnx.State]:
            module = nnx.merge(definition, values)
            y, report = module(x, this_pass.info, this_pass.mode, moe_key)
            return y, report, nnx.state(module, RouterState)

        y, report, states = (jax.checkpoint(run) if self.remat else run)(values, x)
        if this_pass.mode == Mode.TRAIN:
            nnx.update(self.moe, states)
        x = x + dropout(jax.nn.sigmoid(y), self.dropout_rate, out_key)
        return (
            constrain(x, "batch", "length", "width"),
            jax.tree.map(lambda value: value[None], report),
        )


class RecurrentLM(LanguageModel):
    """The language model whose trunk is LSTMs.

    Attributes:
      lstms: the LSTM layers.
      sigmoid_moe, dense: what stands after the first of them; None where the config has none.
    """

    def __init__(self, config: RecurrentLMConfig, key: jax.Array) -> None:
        token_key, lstm_key, between_key = jax.random.split(key, 3)
        width, scale = config.width, config.init_scale
        scaling = EmbeddingScaling.INPUTS if config.tied else EmbeddingScaling.NONE
        tokens = TokenEmbedding(
            config.vocab_size, width, 1.0, token_key, tied=config.tied, scaling=scaling
        )
        super().__init__(config, tokens)
        self.lstms = nnx.List(
            LSTM(width, config.units, width, scale, config.unroll, jax.random.fold_in(lstm_key, i))
            for i in range(config.num_lstms)
        )
        self.sigmoid_moe = SigmoidMoE(config, between_key) if config.sparse else None
        self.dense = (
            ReLUNetwork(width, config.hidden_widths, scale, between_key)
            if config.hidden_widths
            else None
        )

    def trunk(
        self, x: jax.Array, this_pass: Pass, cache: list[LSTMState] | None
    ) -> tuple[jax.Array, list[MoEReport], list[LSTMState]]:
        """See `LanguageModel`."""
        rate = self.config.dropout
        reports, states = [], []
        for i, lstm in enumerate(self.lstms):
            y, state = lstm(x, this_pass.info.mask, None if cache is None else cache[i])
            x = x + this_pass.dropout(y, rate, 2 + i)
            states.append(state)
            if i == 0 and self.sigmoid_moe is not None:
                x, report = self.sigmoid_moe(x, this_pass.fold(1))
                reports.append(report)
            if i == 0 and self.dense is not None:
                x = x + this_pass.dropout(jax.nn.sigmoid(self.dense(x)), rate, 1)
        return x, reports, states

    def empty_trunk_cache(self, batch: int, length: int) -> list[LSTMState]:
        """See `LanguageModel`; the states are as large for any length."""
        return [lstm.empty_state(batch, jnp.dtype(self.config.dtype)) for lstm in self.lstms]
