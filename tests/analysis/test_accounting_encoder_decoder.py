import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.analysis.accounting.encoder_decoder import account
from moe_jax.layers.attention import MultiHead, Positions
from moe_jax.layers.feed_forward import Activation, FeedForwardForm
from moe_jax.layers.mode import Mode
from moe_jax.layers.moe import MoEConfig
from moe_jax.models.abstract_model import AbstractModel
from moe_jax.models.encoder_decoder import EncoderDecoderConfig
from moe_jax.models.stack import SparseDense, StackConfig
from moe_jax.routing.capacity import Capacity
from moe_jax.routing.token_choice import TopK

V, D, F, H, E, M, L = 10, 4, 7, 3 * 2, 5, 6, 3
STACK = StackConfig(
    num_layers=2, width=D, num_heads=3, head_width=2, mlp_width=F, num_experts=E,
    attention=MultiHead(positions=Positions.RELATIVE),
    moe=MoEConfig(TopK(k=1), Capacity(1.25), group_size=8),
)  # fmt: skip
TINY = EncoderDecoderConfig(vocab_size=V, encoder=STACK, decoder=STACK)
ATTENTION, MLP = 4 * D * H, 2 * D * F  # Parameters of one layer's.


def test_parameters_by_hand():
    counted = account(TINY, M, L)
    encoder = 2 * ATTENTION + MLP + E * (MLP + D) + 32 * 3 + (2 * 2 + 1) * D
    decoder = 4 * ATTENTION + MLP + E * (MLP + D) + 32 * 3 + (2 * 3 + 1) * D
    assert counted.parameters == V * D + encoder + decoder
    assert counted.activated_parameters == counted.parameters - 2 * (E - 1) * MLP


def test_flops_by_hand():
    counted = account(TINY, M, L)
    encoder, decoder = 2 * (ATTENTION + MLP), 2 * (2 * ATTENTION + MLP)
    logits = L * V * D
    # An input meets M positions; targets 1 + 2 + 3 and M of the memory: one product of 2 H each.
    scores = 2 * 2 * H * (M * M + 6 + L * M)
    assert counted.algorithmic_flops == 2 * (M * encoder + L * decoder + logits) + scores
    # Keys and values of the memory are of the inputs: 2 D H. 10 rows of experts for 8 tokens.
    memory = 2 * 2 * D * H
    experts = D * E + (1.25 - 1) * MLP
    executed = M * (encoder + memory + experts) + L * (decoder - memory + experts) + logits
    scores = 2 * 4 * H * (M * M + L * L + L * M)
    assert counted.executed_flops == 2 * executed + scores


def test_executed_flops_equal_what_xla_counts():
    encoder = StackConfig(
        num_layers=2, width=64, num_heads=2, head_width=32, mlp_width=256, num_experts=4,
        feed_forward=FeedForwardForm(Activation.GELU, gated=True),
        attention=MultiHead(positions=Positions.RELATIVE), sparse_dense=SparseDense.AFTER,
        moe=MoEConfig(TopK(k=2), group_size=64, experts=FeedForwardForm(gated=True)), unroll=True,
    )  # fmt: skip
    decoder = dataclasses.replace(encoder, sparse_dense=SparseDense.NONE, num_experts=8)
    config = EncoderDecoderConfig(vocab_size=512, encoder=encoder, decoder=decoder)
    batch, inputs, targets = 4, 64, 32
    abstract_model = AbstractModel.of(config)

    def forward(parameters, inputs, targets):
        return abstract_model.merge(parameters)(inputs, None, targets, None, Mode.TRAIN)

    tokens = [jax.ShapeDtypeStruct((batch, length), jnp.int32) for length in (inputs, targets)]
    compiled = jax.jit(forward).lower(abstract_model.shapes, *tokens).compile()
    counted = compiled.cost_analysis()["flops"] / batch
    # XLA also counts every elementwise operation (norms, softmax, GELU, masks) and the router's
    # one-hot sums; products are all of ours.
    assert 1.0 <= counted / account(config, inputs, targets).executed_flops < 1.03
