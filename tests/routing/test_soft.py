import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from moe_jax.errors import UserError
from moe_jax.routing import soft
from moe_jax.routing.capacity import Capacity
from moe_jax.routing.soft import SoftMoE, SoftVariant
from tests.routing.inputs import group, vectors

S, D, E, P = 6, 4, 3, 2


@functools.partial(jax.jit, static_argnames=("variant", "noise", "train"))
def routed(x, mask, parameters, variant=SoftVariant.SOFT, noise=0.0, train=True):
    router = SoftMoE(P, variant, noise)
    return router.route(parameters, group(x, mask=mask, train=train), E, capacity=1)


def parameters(seed=1, scale=2.0):
    mu = vectors(D * E, P, seed=seed).reshape(D, E, P)
    return {"mu": mu, "scale": jnp.float32(scale)}


def loop(x, mask, mu, scale, variant):
    """dispatch and combine [S, E, P] from the definition, token by token and slot by slot."""
    slots = [(e, p) for e in range(E) for p in range(P)]
    real = [s for s in range(S) if mask[s]]
    logit = {}
    for s in range(S):
        for e, p in slots:
            a, b = x[s].astype(float), mu[:, e, p].astype(float)
            unit_a, unit_b = a / np.sqrt((a * a).sum() + 1e-6), b / np.sqrt((b * b).sum() + 1e-6)
            logit[s, e, p] = scale * sum(unit_a * unit_b)
    dispatch, combine = np.zeros((S, E, P)), np.zeros((S, E, P))
    for s in real:
        for e, p in slots:
            if variant in ("soft", "soft_uniform"):
                total = sum(np.exp(logit[t, e, p]) for t in real)
                dispatch[s, e, p] = np.exp(logit[s, e, p]) / total
            else:
                dispatch[s, e, p] = 1 / len(real)
            if variant in ("soft", "uniform_soft"):
                total = sum(np.exp(logit[s, f, q]) for f, q in slots)
                combine[s, e, p] = np.exp(logit[s, e, p]) / total
            else:
                combine[s, e, p] = 1 / (E * P)
            if variant == "identity":
                dispatch[s, e, p] = combine[s, e, p] = e * P + p == s
    return dispatch, combine


@given(st.integers(0, 2**32 - 1), st.sampled_from(list(SoftVariant)))
@settings(max_examples=25, deadline=None)
def test_weights_and_statistics_equal_the_loop(seed, variant):
    rng = np.random.default_rng(seed)
    x, mask = rng.normal(size=(S, D)).astype(np.float32) * 3, rng.random(S) < 0.7
    mu, scale = rng.normal(size=(D, E, P)).astype(np.float32), np.float32(rng.uniform(0.5, 4))
    routing = routed(x, mask, {"mu": mu, "scale": scale}, variant)
    dispatch, combine = loop(x, mask, mu, scale, variant)
    np.testing.assert_allclose(routing.assignment.dispatch, dispatch, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(routing.assignment.combine, combine, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        routing.probabilities, np.where(mask[:, None], combine.sum(axis=2), 1 / E), rtol=1e-4
    )
    assert not routing.losses
    if mask.any():
        values = {name: mean.value() for name, mean in routing.statistics.items()}
        load = np.mean([combine[s].sum(axis=1) for s in range(S) if mask[s]], axis=0)
        np.testing.assert_allclose(values["load"], load, rtol=1e-4, atol=1e-6)
        largest = np.mean([dispatch[:, e, p].max() for e in range(E) for p in range(P)])
        np.testing.assert_allclose(values["largest_dispatch"], largest, rtol=1e-4)


def test_logits_by_hand():
    # |(3, 4)| = 5, and the slots' vectors are 2 (1, 0), 7 (0, 1) and (3, 4): cosines .6, .8, 1,
    # and (0, -2) has cosines 0, -1, -.8. Times the scale of 10.
    mu = jnp.array([[2.0, 0.0, 3.0], [0.0, 7.0, 4.0]])[:, :, None]
    logits = soft.slot_logits(jnp.array([[3.0, 4.0], [0.0, -2.0]]), mu, jnp.float32(10))
    np.testing.assert_allclose(logits[..., 0], [[6, 8, 10], [0, -10, -8]], rtol=1e-4, atol=1e-5)


def test_one_softmax_is_over_real_tokens_and_one_over_all_slots_by_hand():
    # Two experts of one slot; token 2 is padding. Exponentials of the logits: [[1, 3], [4, 1]].
    logits = jnp.log(jnp.array([[1.0, 3.0], [4.0, 1.0], [9.0, 9.0]]))[:, :, None]
    mask = jnp.array([True, True, False])
    dispatch, combine = soft.dispatch_weights(logits, mask), soft.combine_weights(logits, mask)
    np.testing.assert_allclose(dispatch[..., 0], [[0.2, 0.75], [0.8, 0.25], [0, 0]], rtol=1e-5)
    np.testing.assert_allclose(combine[..., 0], [[0.25, 0.75], [0.8, 0.2], [0, 0]], rtol=1e-5)


def test_the_two_halves_of_the_ablations_are_the_right_way_round():
    x, mask, whole = vectors(S, D), np.ones(S, bool), parameters()
    both = routed(x, mask, whole).assignment
    first = routed(x, mask, whole, SoftVariant.SOFT_UNIFORM).assignment
    second = routed(x, mask, whole, SoftVariant.UNIFORM_SOFT).assignment
    np.testing.assert_array_equal(first.dispatch, both.dispatch)
    np.testing.assert_allclose(first.combine, 1 / (E * P), rtol=1e-6)
    np.testing.assert_allclose(second.dispatch, 1 / S, rtol=1e-6)
    np.testing.assert_array_equal(second.combine, both.combine)


@pytest.mark.parametrize("variant", list(SoftVariant))
def test_contents_of_padding_change_nothing(variant):
    x, mask = vectors(S, D), np.arange(S) % 3 != 1
    one, other = (
        routed(value, mask, parameters(), variant)
        for value in (x, x.at[1].set(50.0).at[4].set(-50.0))
    )
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("real", [0, S])
def test_values_and_gradients_are_finite_for_padding_only_and_for_zeros(real):
    def total(parameters, x):
        routing = routed(x, np.arange(S) < real, parameters)
        assignment = routing.assignment
        return (assignment.dispatch**2 + assignment.combine**2).sum(), routing

    zeros = jax.tree.map(jnp.zeros_like, parameters())
    for values, x in ((zeros, vectors(S, D)), (parameters(), jnp.zeros((S, D)))):
        (_, routing), gradients = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(values, x)
        for leaf in jax.tree.leaves((routing, gradients)):
            assert np.isfinite(leaf).all()
        assert routing.assignment.dispatch.any() == (real > 0)


def test_gradients_equal_finite_differences():
    mask = np.arange(S) != 2
    weights = vectors(2 * S, E * P, seed=5).reshape(2, S, E, P)

    def value(parameters, x):
        assignment = routed(x, mask, parameters).assignment
        return (weights[0] * assignment.dispatch + weights[1] * assignment.combine).sum()

    check_grads(value, (parameters(), vectors(S, D)), 1, ["rev"], atol=2e-2, rtol=2e-2)


def test_noise_has_the_given_deviation_in_training_only():
    x, mask = vectors(S, D), np.ones(S, bool)
    clean = routed(x, mask, parameters()).assignment.combine
    evaluated = routed(x, mask, parameters(), noise=0.5, train=False).assignment.combine
    np.testing.assert_array_equal(clean, evaluated)
    noisy = routed(x, mask, parameters(), noise=0.5).assignment.combine
    # Log weights differ by the noise, but for a constant per token.
    moved = np.log(noisy) - np.log(clean)
    moved = (moved - moved.mean(axis=(1, 2), keepdims=True)).ravel()
    # 36 draws less 6 means: the standard error of the deviation is 0.5 / sqrt(60) = 0.065.
    np.testing.assert_allclose(np.sqrt((moved**2).sum() / 30), 0.5, atol=0.2)


def test_initial_slots_have_variance_one_over_width_and_scale_one():
    made = SoftMoE(slots_per_expert=4).init(jax.random.key(0), 64, 8)
    assert made["mu"].shape == (64, 8, 4)
    # 2048 draws: within 5 standard errors of 3%.
    np.testing.assert_allclose(made["mu"].var() * 64, 1, atol=0.15)
    assert made["scale"] == 1
    assert made["scale"].shape == ()


@pytest.mark.parametrize("variant", [SoftVariant.UNIFORM, SoftVariant.IDENTITY])
def test_variants_without_logits_have_no_parameters(variant):
    router = SoftMoE(P, variant)
    assert router.init(jax.random.key(0), D, E) == {}
    router.route({}, group(vectors(S, D)), E, 1)


def test_only_identity_is_causal():
    causal = [variant for variant in SoftVariant if SoftMoE(variant=variant).leak is None]
    assert causal == [SoftVariant.IDENTITY]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"slots_per_expert": 0}, "slots_per_expert is 0"),
        ({"noise": -1.0}, "noise is -1.0"),
        ({"noise": 0.1, "variant": SoftVariant.UNIFORM}, "variant=uniform has no logits"),
    ],
)
def test_bad_fields_are_named(fields, named):
    with pytest.raises(UserError, match=f"router.*{named}"):
        SoftMoE(**fields).validate(E)
    SoftMoE(noise=0.1).validate(E)


def test_identity_needs_as_many_slots_as_tokens():
    with pytest.raises(UserError, match=r"3 experts 3 slots.* 6 tokens"):
        SoftMoE(1, SoftVariant.IDENTITY).expert_capacity(Capacity(), S, E, train=True)
