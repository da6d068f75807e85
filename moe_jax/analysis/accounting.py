"""Parameters and FLOPs of a model, from its config.

Axis letters: L sequence length, d width, f feed-forward width, H heads, h head width, E experts,
K choices per token, C slots per expert, S tokens per group, V vocabulary.

FLOPs are of the forward pass, two per multiply-add, and of two kinds:
  algorithmic  what the papers count: matrix products and attention scores of the experts a token
               chose; router, norms and activations are left out (Switch, section 2.1 and Table 1)
  executed     what the machine does: every slot of every expert whether filled or not, every
               attention score whether masked or not, and the router (without the products that mix
               tokens in Soft MoE and in einsum dispatch, and without padding of dropless rows)
A training step costs about three forward passes; rematerialization adds up to one.
"""

import dataclasses
import math

import jax

from moe_jax.errors import UserError
from moe_jax.models.decoder_lm import DecoderLMConfig, SparseDense
from moe_jax.models.definition import ModelDefinition


@dataclasses.dataclass(frozen=True)
class Accounting:
    """Numbers of one model.

    Attributes:
      parameters: all of them.
      activated_parameters: without the experts that a token did not choose.
      algorithmic_flops: per token, forward.
      executed_flops: per token, forward, at the training capacity.
    """

    parameters: int
    activated_parameters: int
    algorithmic_flops: float
    executed_flops: float


def of_decoder_lm(config: DecoderLMConfig, length: int) -> Accounting:
    """Counts a decoder on sequences of `length` tokens."""
    shapes = ModelDefinition.of(config).shapes
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    sparse = len(config.moe_layers)
    dense = config.num_layers - sparse
    if config.sparse_dense != SparseDense.NONE:
        dense += sparse
    expert = 2 * config.width * config.mlp_width  # Parameters of one feed-forward network.
    heads = config.num_heads * config.head_width
    common = 2.0 * (
        config.num_layers * 4 * config.width * heads
        + (dense + sparse * config.moe.shared_experts) * expert
        + config.vocab_size * config.width
    )
    scores = config.num_layers * 4 * heads  # Per attended position: q k and weights times v.
    seen = length if config.bidirectional else (length + 1) / 2
    algorithmic = common + scores * seen
    executed = common + scores * length
    activated: float = parameters
    moe, tokens = config.moe, config.moe.group_size
    for num_experts in config.experts_of_layers if sparse else ():
        slots = moe.slots(num_experts, train=True)
        visited = moe.router.experts_per_token(tokens, num_experts, slots)
        algorithmic += 2 * expert * visited
        rows = moe.expert_rows(num_experts)
        executed += 2 * (expert * rows + config.width * num_experts)
        activated -= expert * (num_experts - visited)
    return Accounting(parameters, round(activated), algorithmic, executed)


def dense_twin(config: DecoderLMConfig) -> DecoderLMConfig:
    """The dense model of equal algorithmic FLOPs per token: one expert everywhere.

    Raises:
      UserError: K is not 1, where equal blocks do not give equal FLOPs.
    """
    if config.moe.router.choices != 1:
        raise UserError(
            f"router.k is {config.moe.router.choices}; a dense twin of equal FLOPs needs k=1."
        )
    return dataclasses.replace(config, moe_every=0)


def statistics_bytes_per_layer(num_experts: int, num_losses: int) -> int:
    """Bytes that a token-choice layer's losses and statistics add to the step's all-reduces.

    (sum, count) pairs: load has E + 1 floats; the losses and three scalar statistics have 2 each.
    """
    return 4 * (num_experts + 1 + (num_losses + 3) * 2)
