"""What may stand beside or instead of the plain decoder: branches, pyramids, both directions."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.analysis.accounting.decoder_lm import account
from moe_jax.errors import UserError
from moe_jax.layers.mode import Mode
from moe_jax.layers.moe import MoE, MoEConfig, TokenInfo
from moe_jax.layers.shared_experts import BranchMix
from moe_jax.models.abstract_model import AbstractModel, arrays_of
from moe_jax.models.decoder_lm import DecoderLMConfig
from moe_jax.models.stack import SparseDense
from moe_jax.routing.capacity import Capacity, CapacityRule
from moe_jax.routing.deepseek import DeepSeekV3
from moe_jax.routing.expert_choice import ExpertChoice
from moe_jax.routing.losses import Losses
from moe_jax.routing.soft import SoftMoE, SoftVariant
from moe_jax.routing.token_choice import GShard, TopK

B, L, V = 2, 8, 16
BASE = DecoderLMConfig(
    vocab_size=V,
    max_length=L,
    num_layers=2,
    width=8,
    num_heads=1,
    head_width=8,
    mlp_width=12,
    num_experts=4,
    moe_every=1,
    moe=MoEConfig(TopK(), Capacity(rule=CapacityRule.NO_DROPS), group_size=L),
)
TOKENS = jax.random.randint(jax.random.key(1), (B, L), 0, V)


def parameters_of(config):
    return jax.jit(lambda: arrays_of(config.build(jax.random.key(0)))[0])()


def run(config, parameters, tokens=TOKENS, mode=Mode.EVALUATE):
    abstract_model = AbstractModel.of(config)
    return jax.jit(lambda p, t: abstract_model.merge(p)(t, None, mode)[:2])(parameters, tokens)


# Branches beside the experts


def layer_with(**options):
    config = dataclasses.replace(BASE.moe, **options)
    layer = MoE(config, 8, 12, 4, scale=1.0, key=jax.random.key(3))
    layer.w_out[...] = 5 * layer.w_out[...]  # Top-1 gates are small at the start.
    return layer


X = jax.random.normal(jax.random.key(2), (B, L, 8))


def output(layer):
    graph, state = nnx.split(layer)

    @jax.jit
    def call(state, x):
        return nnx.merge(graph, state)(x, TokenInfo.of(TOKENS), Mode.EVALUATE, None)[0]

    return call(state, X)


def dense_branch(layer, x):
    dense = layer.shared.dense
    return jnp.maximum(x @ dense.w_in[...], 0) @ dense.w_out[...]


def test_shared_experts_add_one_wide_feed_forward_layer():
    plain, shared = layer_with(), layer_with(shared_experts=2)
    assert shared.shared.dense.w_in.shape == (8, 2 * 12)
    expected = output(plain) + dense_branch(shared, X)
    np.testing.assert_allclose(output(shared), expected, rtol=1e-5, atol=1e-6)


def test_the_learned_mix_is_a_softmax_over_the_two_branches():
    plain, mixed = layer_with(), layer_with(shared_experts=1, shared_mix=BranchMix.LEARNED)
    routed, dense = output(plain), dense_branch(mixed, X)
    np.testing.assert_allclose(output(mixed), (routed + dense) / 2, rtol=1e-5, atol=1e-6)
    mixed.shared.mix[...] = jnp.zeros((8, 2)).at[0, 0].set(1.0)
    weight = 1 / (1 + np.exp(-np.asarray(X[..., :1])))  # Logits (x_0, 0).
    np.testing.assert_allclose(
        output(mixed), weight * routed + (1 - weight) * dense, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("place", [SparseDense.BEFORE, SparseDense.AFTER])
def test_sparse_dense_blocks_have_a_dense_sublayer_of_their_own(place):
    config = dataclasses.replace(BASE, sparse_dense=place)
    parameters = parameters_of(config)
    dense = parameters["stack"]["stages"][0]["blocks"][0]["dense"]
    logits, _ = run(config, parameters)
    other = dataclasses.replace(
        BASE,
        sparse_dense={"before": SparseDense.AFTER, "after": SparseDense.BEFORE}[place],
    )
    assert np.abs(logits - run(other, parameters)[0]).max() > 1e-4, "the order does not matter"
    # A dense sublayer that adds nothing leaves the plain model.
    dense["feed_forward"]["w_out"] = 0 * dense["feed_forward"]["w_out"]
    silent, _ = run(config, parameters)
    del parameters["stack"]["stages"][0]["blocks"][0]["dense"]
    np.testing.assert_allclose(silent, run(BASE, parameters)[0], rtol=1e-6)
    assert np.abs(silent - logits).max() > 1e-3


# Expert counts by layer


PYRAMID = dataclasses.replace(BASE, num_layers=3, experts_by_layer=(2, 2, 4))


def test_a_pyramid_has_a_stage_for_each_run_of_equal_counts():
    assert [(stage.experts[-1], stage.count) for stage in PYRAMID.stages] == [(2, 2), (4, 1)]
    parameters = parameters_of(PYRAMID)
    shapes = [
        stage["blocks"][0]["mlp"]["w_in"].shape[:2]
        for stage in parameters["stack"]["stages"].values()
    ]
    assert shapes == [(2, 2), (1, 4)]
    total = sum(leaf.size for leaf in jax.tree.leaves(parameters))
    assert total == account(PYRAMID, L).parameters
    _, reports = run(PYRAMID, parameters)
    assert [report.statistics["load"].shape for report in reports] == [(2, 2), (1, 4)]


def test_a_pyramid_of_equal_counts_is_the_plain_model():
    pyramid = dataclasses.replace(BASE, experts_by_layer=(4, 4))
    parameters = parameters_of(BASE)
    np.testing.assert_array_equal(run(pyramid, parameters)[0], run(BASE, parameters)[0])


def test_a_pyramid_decodes_with_a_cache():
    parameters = parameters_of(PYRAMID)
    abstract_model = AbstractModel.of(PYRAMID)

    @jax.jit
    def decode(parameters, tokens, cache):
        logits, _, cache = abstract_model.merge(parameters)(tokens, None, Mode.DECODE, cache=cache)
        return logits, cache

    cache = abstract_model.merge(parameters).empty_cache(B, L)
    pieces = []
    for t in range(0, L, 2):
        logits, cache = decode(parameters, TOKENS[:, t : t + 2], cache)
        pieces.append(logits)
    full, _ = run(PYRAMID, parameters, mode=Mode.DECODE)
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), full, rtol=1e-5, atol=1e-5)


def test_flops_of_branches_and_pyramids_by_hand():
    expert = 2 * 8 * 12
    plain = account(BASE, L)
    shared = dataclasses.replace(BASE, moe=dataclasses.replace(BASE.moe, shared_experts=2))
    assert account(shared, L).algorithmic_flops - plain.algorithmic_flops == 2 * (2 * 2 * expert)
    beside = dataclasses.replace(BASE, sparse_dense=SparseDense.AFTER)
    assert account(beside, L).algorithmic_flops - plain.algorithmic_flops == 2 * 2 * expert
    grown = dataclasses.replace(BASE, experts_by_layer=(4, 8))
    assert account(grown, L).algorithmic_flops == plain.algorithmic_flops
    assert account(grown, L).parameters - plain.parameters == 4 * (expert + 8)
    assert account(grown, L).activated_parameters - plain.activated_parameters == 4 * 8


# Both directions, and leaks


def changes_before(config, t):
    """Whether changing token t changes any logits before it."""
    parameters = parameters_of(config)
    before, _ = run(config, parameters)
    after, _ = run(config, parameters, TOKENS.at[:, t].set((TOKENS[:, t] + 1) % V))
    return bool((before[:, :t] != after[:, :t]).any())


def test_only_a_bidirectional_model_sees_later_tokens():
    assert not changes_before(BASE, L - 1)
    assert changes_before(dataclasses.replace(BASE, bidirectional=True), L - 1)


def test_a_leaking_router_needs_a_bidirectional_model_or_consent():
    leaking = dataclasses.replace(BASE, moe=dataclasses.replace(BASE.moe, router=GShard()))
    with pytest.raises(
        UserError, match=r"GShard.*second choice is served after.*model.accept_leak=true"
    ):
        leaking.validate()
    dataclasses.replace(leaking, bidirectional=True).validate()
    dataclasses.replace(leaking, accept_leak=True).validate()


@pytest.mark.parametrize("router", [ExpertChoice(), SoftMoE()], ids=lambda r: type(r).__name__)
def test_routers_of_whole_groups_refuse_to_decode(router):
    config = dataclasses.replace(
        BASE, accept_leak=True, moe=dataclasses.replace(BASE.moe, router=router)
    )
    abstract_model = AbstractModel.of(config)
    with pytest.raises(UserError, match=r"routes whole groups and cannot decode token by token"):
        jax.eval_shape(
            lambda p: abstract_model.merge(p)(TOKENS, None, Mode.DECODE)[0], abstract_model.shapes
        )


def test_a_bidirectional_model_refuses_to_decode():
    config = dataclasses.replace(BASE, bidirectional=True)
    abstract_model = AbstractModel.of(config)
    with pytest.raises(UserError, match="bidirectional is true, and such a model cannot generate"):
        jax.eval_shape(
            lambda p: abstract_model.merge(p)(TOKENS, None, Mode.DECODE)[0], abstract_model.shapes
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts_by_layer": (4, 0)}, r"experts_by_layer is \(4, 0\); it must be at least 1"),
        ({"num_experts": 0}, "num_experts is 0; it must be at least 1"),
        (
            {"moe_every": 0, "sparse_dense": SparseDense.AFTER},
            "sparse_dense is after, but model.moe_every is 0",
        ),
        (
            {"moe_every": 0, "experts_by_layer": (4, 4)},
            r"experts_by_layer is \(4, 4\), but model.moe_every is 0",
        ),
        (
            {"moe": MoEConfig(SoftMoE(variant=SoftVariant.IDENTITY), group_size=L)},
            "gives 4 experts 4 slots, but router.variant=identity needs one for each of the 8",
        ),
    ],
)
def test_bad_fields_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(BASE, **changes).validate()


# State outside the optimizer


def test_training_renews_the_expert_bias_and_evaluation_does_not():
    router = DeepSeekV3(k=1, groups=1, groups_per_token=1, bias_rate=0.5, losses=Losses())
    config = dataclasses.replace(BASE, moe=dataclasses.replace(BASE.moe, router=router))
    abstract_model = AbstractModel.of(config)

    @functools.partial(jax.jit, static_argnums=0)
    def step(mode, parameters, variables):
        model = abstract_model.merge(parameters, variables)
        _, (report,), _ = model(TOKENS, None, mode)
        return report.statistics["load"], arrays_of(model)[1]

    parameters = parameters_of(config)
    variables = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), abstract_model.variable_shapes)
    load, renewed = step(Mode.TRAIN, parameters, variables)
    (bias,) = jax.tree.leaves(renewed)
    assert bias.shape == (2, 4)  # Periods, experts.
    np.testing.assert_array_equal(bias, 0.5 * np.sign(np.float32(0.25) - load))
    assert (bias != 0).any()
    _, kept = step(Mode.EVALUATE, parameters, renewed)
    np.testing.assert_array_equal(jax.tree.leaves(kept)[0], bias)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shared_experts": -1}, "moe.shared_experts is -1; it must be at least 0"),
        ({"shared_mix": BranchMix.LEARNED}, "moe.shared_mix is learned, but moe.shared_experts is"),
    ],
)
def test_bad_branches_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(BASE.moe, **changes).validate(4)
