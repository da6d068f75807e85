import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from moe_jax.analysis.accounting.decoder_lm import account, dense_twin
from moe_jax.analysis.accounting.stack import statistics_bytes_per_layer
from moe_jax.errors import UserError
from moe_jax.layers.mode import Mode
from moe_jax.layers.moe import MoEConfig
from moe_jax.models.abstract_model import AbstractModel
from moe_jax.models.decoder_lm import DecoderLMConfig
from moe_jax.routing.capacity import Capacity
from moe_jax.routing.expert_choice import ExpertChoice
from moe_jax.routing.soft import SoftMoE
from moe_jax.routing.token_choice import TopK

V, D, F, H, E, L = 10, 4, 7, 3 * 2, 5, 3
TINY = DecoderLMConfig(
    vocab_size=V, max_length=8, num_layers=2, width=D, num_heads=3, head_width=2, mlp_width=F,
    num_experts=E, moe_every=2, moe=MoEConfig(TopK(k=1), Capacity(1.25), group_size=8),
)  # fmt: skip
ATTENTION, MLP = 4 * D * H, 2 * D * F  # Parameters of one layer's.


def test_parameters_by_hand():
    norms = (2 * 2 + 1) * D
    expected = V * D + norms + 2 * ATTENTION + MLP + (D * E + E * MLP)
    counted = account(TINY, L)
    assert counted.parameters == expected
    assert counted.activated_parameters == expected - (E - 1) * MLP


def test_parameters_equal_the_built_model():
    built = jax.jit(lambda: nnx.state(TINY.build(jax.random.key(0))))()
    sizes = [leaf.size for leaf in jax.tree.leaves(built)]
    assert sum(sizes) == account(TINY, L).parameters


@pytest.mark.parametrize("k", [1, 2])
def test_flops_by_hand(k):
    config = dataclasses.replace(TINY, moe=dataclasses.replace(TINY.moe, router=TopK(k=k)))
    counted = account(config, L)
    shared = 2 * (2 * ATTENTION + MLP + V * D)
    # A token at position i attends to i + 1 others: 1 + 2 + 3 scores over 3 tokens is 2 each,
    # at 2 H for q k and 2 H for the weighted values, in 2 layers.
    assert counted.algorithmic_flops == shared + 2 * 4 * H * 2 + 2 * MLP * k
    # 8 tokens * k * 1.25 / 5 experts = 2 k slots: 10 k rows for 8 tokens.
    rows = 10 * k / 8
    assert counted.executed_flops == pytest.approx(
        shared + 2 * 4 * H * L + 2 * MLP * rows + 2 * D * E
    )


def test_flops_where_experts_or_slots_choose():
    choice = dataclasses.replace(
        TINY, moe=MoEConfig(ExpertChoice(), Capacity(2.0), group_size=8), bidirectional=True
    )
    shared = 2 * (2 * ATTENTION + MLP + V * D) + 2 * 4 * H * L  # Every token sees all L.
    # ceil(8 * 2 / 5) = 4 slots of each of 5 experts: 20 rows for 8 tokens.
    assert account(choice, L).algorithmic_flops == shared + 2 * MLP * 20 / 8
    assert account(choice, L).executed_flops == shared + 2 * MLP * 20 / 8 + 2 * D * E
    soft = dataclasses.replace(
        choice, moe=dataclasses.replace(choice.moe, router=SoftMoE(slots_per_expert=3))
    )
    # 15 slots for 8 tokens, whatever the capacity is.
    assert account(soft, L).algorithmic_flops == shared + 2 * MLP * 15 / 8


def test_executed_flops_equal_what_xla_counts():
    config = DecoderLMConfig(
        num_layers=2,
        width=128,
        num_heads=4,
        head_width=32,
        mlp_width=512,
        num_experts=8,
        moe=MoEConfig(group_size=64),
        unroll=True,
    )
    batch, length = 4, 64
    abstract_model = AbstractModel.of(config)

    def forward(parameters, tokens):
        logits, reports, _ = abstract_model.merge(parameters)(tokens, None, Mode.TRAIN)
        return logits, reports

    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    compiled = jax.jit(forward).lower(abstract_model.shapes, tokens).compile()
    counted = compiled.cost_analysis()["flops"] / (batch * length)
    # XLA also counts every elementwise operation (norms, softmax, relu, masks) and the router's
    # one-hot sums; products are all of ours.
    assert 1.0 <= counted / account(config, length).executed_flops < 1.03


def test_the_dense_twin_has_equal_algorithmic_flops():
    sparse, dense = account(TINY, L), account(dense_twin(TINY), L)
    assert dense.algorithmic_flops == sparse.algorithmic_flops
    assert dense.executed_flops < sparse.executed_flops
    assert dense.parameters == dense.activated_parameters
    assert dense.parameters == sparse.activated_parameters - D * E  # The router.


def test_a_twin_of_two_choices_is_refused():
    config = dataclasses.replace(TINY, moe=MoEConfig(TopK(k=2)))
    with pytest.raises(UserError, match=r"router.k is 2; a dense twin of equal FLOPs needs k=1"):
        dense_twin(config)


def test_counting_does_not_build_the_model():
    # 64 experts of 12 layers of width 4096: 200 GB if anything were allocated.
    large = DecoderLMConfig(
        num_layers=24, width=4096, mlp_width=16384, num_experts=64, moe=MoEConfig(group_size=256)
    )
    assert account(large, 256).parameters > 12 * 64 * math.prod((2, 4096, 16384))


def test_statistics_bytes():
    # Load 8 + 1; dropped, entropy, logsumexp, and two losses: 2 each; float32.
    assert statistics_bytes_per_layer(8, 2) == 4 * 19
