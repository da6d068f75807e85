"""Our routers answer as those of Hugging Face `transformers`.

The answers were written by generate.py, where the arrays are explained; torch is not needed here.
The functions of transformers depart from the papers, and from each other, in these ways:
  Switch      f counts first choices, as in the paper. A group is a row of the batch, with its tokens
              of ALL layers, which are joined along the length before f and P are taken.
  Mixtral, OLMoE, Qwen
              f counts all K choices, so that perfect balance gives K and not 1. One group is the
              whole batch, again with all layers joined.
  padding     Switch has no mask: padding takes slots and enters both losses. The others leave it
              out of the loss only where they are given a mask.
Our layers are not joined: a task sums or averages their losses.
"""

import dataclasses
import functools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.layers.mode import Mode
from moe_jax.layers.moe import MoE, MoEConfig, TokenInfo
from moe_jax.routing import losses
from moe_jax.routing.capacity import Capacity
from moe_jax.routing.deepseek import DeepSeekV3
from moe_jax.routing.losses import Losses
from moe_jax.routing.router import Mean, TokenAssignment
from moe_jax.routing.token_choice import TopK
from tests.routing.inputs import group

ROUTERS = {
    "mixtral": TopK(k=2, renormalize=True),
    "olmoe": TopK(k=3, renormalize=False),
    "qwen2_moe": TopK(k=4, renormalize=True),
    "qwen3_moe": TopK(k=3, renormalize=True),
}
NAMES = ["switch", "deepseek_v3", *ROUTERS]
E, LAYERS = 8, 2
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


@functools.cache
def load(name):
    with np.load(pathlib.Path(__file__).parent / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)


def tokens_of(file):
    """[T, d]: the batch as one group."""
    return file["x"].reshape(-1, file["x"].shape[-1])


def route(router, parameters, x, capacity, mask=None):
    return router.route(parameters, group(x, mask=mask, train=False), E, capacity)


def values(means):
    """Name -> value of every Mean."""
    return jax.tree.map(Mean.value, means, is_leaf=lambda leaf: isinstance(leaf, Mean))


@pytest.mark.parametrize("name", NAMES)
def test_files_name_the_versions_that_wrote_them(name):
    metadata = json.loads(str(load(name)["metadata"]))
    assert metadata.keys() == {"seed", "python", "numpy", "torch", "transformers"}
    for package in metadata.keys() - {"seed"}:
        assert re.fullmatch(r"\d+\.\d+\.\d+(\+cpu)?", metadata[package]), package
    assert metadata == json.loads(str(load("switch")["metadata"])), "written at different times"


# Switch.

SWITCH = TopK(k=1, losses=Losses(load_balancing=1.0, router_z=1.0))


def switch_rows(weights, masks):
    """Every row of the batch is a group: routings with a leading axis B."""
    file = load("switch")

    def row(x, mask):
        return route(SWITCH, {"weights": weights.T}, x, int(file["capacity"]), mask)

    return jax.vmap(row)(file["x"], masks)


switch_layers_of = jax.jit(jax.vmap(switch_rows, in_axes=(0, None)))


def switch_layers(padding=0):
    """Routings [N, B, ...] when the last tokens of every row are padding."""
    file = load("switch")
    masks = np.ones(file["x"].shape[:2], bool)
    masks[:, masks.shape[1] - padding :] = False
    return switch_layers_of(file["weights"], masks)


def over_rows(mean):
    """[N] the loss of the batch: sums and counts of its rows are added first."""
    return Mean(mean.total.sum(axis=1), mean.count.sum(axis=1)).value()


def dispatched(assignment: TokenAssignment):
    """[..., S, E] int, 1 where an expert serves the token."""
    served = np.asarray(assignment.position_in_expert) < assignment.capacity
    return (np.eye(E, dtype=int)[np.asarray(assignment.experts)] * served[..., None]).sum(axis=-2)


def test_switch_chooses_the_same_experts_at_the_same_gates():
    file, routing = load("switch"), switch_layers()
    np.testing.assert_array_equal(routing.assignment.experts[..., 0], file["experts"])
    close(routing.assignment.gates[..., 0], file["gates"])


def test_switch_drops_the_same_tokens():
    file = load("switch")
    dropped = 1 - file["dispatch"].sum(axis=-1)
    assert 0.1 < dropped.mean() < 0.9, "the case drops nothing, or everything"
    np.testing.assert_array_equal(dispatched(switch_layers().assignment), file["dispatch"])


def test_switch_serves_tokens_alike_whether_padding_after_them_takes_slots():
    # transformers: it does; here: it does not. Left to right, nobody before it can tell.
    file, padding = load("switch"), 3
    ours = dispatched(switch_layers(padding).assignment)
    np.testing.assert_array_equal(ours[:, :, :-padding], file["dispatch"][:, :, :-padding])
    assert not ours[:, :, -padding:].any()
    assert file["dispatch"][:, :, -padding:].any()


def test_switch_losses_of_one_layer_are_means_over_rows_and_tokens():
    file, routing = load("switch"), switch_layers()
    for name in ("load_balancing", "router_z"):
        close(over_rows(routing.losses[name]), file[name], err_msg=name)


def test_switch_losses_count_padding_only_in_transformers():
    file, routing = load("switch"), switch_layers(padding=3)
    for name in ("load_balancing", "router_z"):
        assert np.abs(over_rows(routing.losses[name]) - file[name]).min() > 1e-3, name


def test_switch_joins_the_tokens_of_all_layers_before_it_takes_fractions():
    file, routing = load("switch"), switch_layers()

    def row(probabilities, experts):  # [N, S, E], [N, S, 1].
        joined = probabilities.reshape(-1, E), experts.reshape(-1, 1)
        return losses.load_balancing(*joined, jnp.ones(len(joined[1]), bool)).value()

    per_row = jax.jit(jax.vmap(row, in_axes=1))(routing.probabilities, routing.assignment.experts)
    close(per_row.mean(), file["load_balancing_of_layers"])
    # Not what the paper's formula gives layer by layer, neither as a mean nor as a sum:
    assert abs(file["load_balancing"].mean() - file["load_balancing_of_layers"]) > 1e-3
    assert abs(file["load_balancing"].sum() - file["load_balancing_of_layers"]) > 1e-3


def test_switch_z_loss_of_joined_layers_is_the_mean_over_layers():
    of_layers = over_rows(switch_layers().losses["router_z"])
    close(of_layers.mean(), load("switch")["router_z_of_layers"])


def test_switch_gradients_are_the_same():
    file = load("switch")
    masks = np.ones(file["x"].shape[:2], bool)

    def value(weights, cotangent, loss_weight):
        routing = switch_rows(weights, masks)
        gates = (routing.assignment.gates[..., 0] * cotangent).sum()
        return gates + loss_weight * routing.losses["load_balancing"].total.mean()  # Over rows.

    gradient = jax.jit(jax.grad(value))
    for layer, weights in enumerate(file["weights"]):
        cotangent = file["cotangent"][layer]
        close(gradient(weights, cotangent, 0.0), file["gates_gradient"][layer])
        close(gradient(weights, 0 * cotangent, 1.0), file["load_balancing_gradient"][layer])


def test_switch_layer_gives_the_same_output():
    file = load("switch")
    rows, length, width = file["x"].shape
    # The rule is ceil(S * factor / E).
    capacity = Capacity(evaluation_factor=float(file["capacity"]) * E / length)
    config = MoEConfig(router=SWITCH, capacity=capacity, group_size=length)
    layer = MoE(config, width, file["w_in"].shape[1], E, scale=1.0, key=jax.random.key(0))
    layer.router["weights"][...] = jnp.array(file["weights"][0].T)
    layer.w_in[...] = jnp.array(file["w_in"].transpose(0, 2, 1))
    layer.w_out[...] = jnp.array(file["w_out"].transpose(0, 2, 1))
    info = TokenInfo.of(jnp.zeros((rows, length), jnp.int32))
    graph, state = nnx.split(layer)

    @jax.jit
    def apply(state, x):
        return nnx.merge(graph, state)(x, info, Mode.EVALUATE, None)

    y, report = apply(state, file["x"])
    close(y, file["output"])
    close(report.losses["load_balancing"], file["load_balancing"][0])
    close(report.losses["router_z"], file["router_z"][0])
    dropped = file["dispatch"][0].sum(axis=-1) == 0
    close(report.statistics["dropped"], dropped.mean())
    assert dropped.any()
    assert not y[dropped].any()  # The residual carries them, in both.


# Mixtral and those made like it.


def softmax_routing(name, weights, mask):
    """The whole batch as one group in which nothing is dropped."""
    x = tokens_of(load(name))
    wanted = Losses(load_balancing=1.0, load_balancing_all_choices=1.0, expert_level=1.0)
    router = dataclasses.replace(ROUTERS[name], losses=wanted)
    return route(router, {"weights": weights.T}, x, len(x), mask)


@functools.cache
def softmax_routings(name):
    """For the ending of the names in the file: routings with a leading layer axis."""
    file = load(name)
    layers = jax.jit(jax.vmap(functools.partial(softmax_routing, name), in_axes=(0, None)))
    mask = file["mask"].reshape(-1)
    return {
        "": layers(file["weights"], np.ones_like(mask)),
        "_masked": layers(file["weights"], mask),
    }


@pytest.mark.parametrize("name", ROUTERS)
def test_softmax_routers_choose_the_same_experts_at_the_same_gates(name):
    file = load(name)
    assignment = softmax_routings(name)[""].assignment
    np.testing.assert_array_equal(assignment.experts, file["experts"])  # Best first in both.
    close(assignment.gates, file["gates"])


@pytest.mark.parametrize("ending", ["", "_masked"])
@pytest.mark.parametrize("name", ROUTERS)
def test_loss_counts_all_choices_so_balance_is_k(name, ending):
    got = values(softmax_routings(name)[ending].losses)
    want = load(name)["load_balancing" + ending]
    close(got["load_balancing_all_choices"], want)
    # DeepSeekMoE's, which is 1 at balance, is a K-th of it.
    close(ROUTERS[name].k * got["expert_level"], want)
    # Switch's own, of first choices, is another number, and no multiple of it.
    assert np.ptp(got["load_balancing"] / want) > 1e-3


@pytest.mark.parametrize("name", ROUTERS)
def test_padding_enters_the_loss_of_transformers_without_a_mask(name):
    file = load(name)
    assert not file["mask"].all()
    assert np.abs(file["load_balancing"] - file["load_balancing_masked"]).min() > 1e-3


@pytest.mark.parametrize("ending", ["", "_masked"])
@pytest.mark.parametrize("name", ROUTERS)
def test_transformers_joins_the_tokens_of_all_layers_before_it_takes_fractions(name, ending):
    file, routing = load(name), softmax_routings(name)[""]
    mask = file["mask"].reshape(-1) | (ending == "")
    loss = losses.load_balancing_all_choices(
        routing.probabilities.reshape(-1, E),
        routing.assignment.experts.reshape(-1, ROUTERS[name].k),
        jnp.tile(mask, LAYERS),
    )
    want = file["load_balancing_of_layers" + ending]
    close(loss.value(), want)
    # Not the mean over layers, which `auxiliary_reduction=mean` takes.
    assert abs(file["load_balancing" + ending].mean() - want) > 1e-3


@pytest.mark.parametrize("name", ROUTERS)
def test_softmax_routers_have_the_same_gradients(name):
    file = load(name)
    mask = file["mask"].reshape(-1)

    def value(weights, cotangent, loss_weight):
        routing = softmax_routing(name, weights, mask)
        gates = (routing.assignment.gates * cotangent).sum()
        return gates + loss_weight * routing.losses["load_balancing_all_choices"].value()

    gradient = jax.jit(jax.grad(value))
    for layer, weights in enumerate(file["weights"]):
        cotangent = file["cotangent"][layer]
        close(gradient(weights, cotangent, 0.0), file["gates_gradient"][layer])
        close(gradient(weights, 0 * cotangent, 1.0), file["load_balancing_gradient"][layer])


# DeepSeek-V3.


def deepseek(layer):
    """Our router with the settings of the file's layer; its losses are not in transformers."""
    file = load("deepseek_v3")
    return DeepSeekV3(
        k=file["experts"].shape[-1],
        groups=int(file["groups"][layer]),
        groups_per_token=int(file["groups_per_token"][layer]),
        gate_scale=float(file["gate_scale"]),
        losses=Losses(),
    )


def spread(experts, numbers):
    """[T, E] numbers [T, K] where they belong: transformers returns the choices in any order."""
    rows = jnp.arange(len(numbers))[:, None]
    return jnp.zeros((len(numbers), E)).at[rows, experts].add(numbers)


@functools.cache
def deepseek_answer(layer):
    """Our assignment, and the gradient of what the file takes it of."""
    file = load("deepseek_v3")
    x = tokens_of(file)
    cotangent = spread(file["experts"][layer], file["cotangent"][layer])

    def value(parameters):
        assignment = route(deepseek(layer), parameters, x, len(x)).assignment
        return (spread(assignment.experts, assignment.gates) * cotangent).sum(), assignment

    parameters = {"weights": file["weights"][layer].T, "bias": file["bias"][layer]}
    gradient, assignment = jax.jit(jax.grad(value, has_aux=True))(parameters)
    return assignment, gradient


@pytest.mark.parametrize("layer", range(LAYERS))
def test_deepseek_v3_chooses_the_same_experts_at_the_same_gates(layer):
    file, (got, _) = load("deepseek_v3"), deepseek_answer(layer)
    experts, gates = file["experts"][layer], file["gates"][layer]
    np.testing.assert_array_equal(np.sort(got.experts), np.sort(experts))
    close(spread(got.experts, got.gates), spread(experts, gates))


@pytest.mark.parametrize("layer", range(LAYERS))
def test_deepseek_v3_has_the_same_gradient_of_gates_and_none_of_the_bias(layer):
    _, gradient = deepseek_answer(layer)
    close(gradient["weights"].T, load("deepseek_v3")["gates_gradient"][layer])
    assert not gradient["bias"].any()


@pytest.mark.parametrize("layer", range(LAYERS))
def test_bias_and_groups_decide_in_the_deepseek_case(layer):
    file = load("deepseek_v3")
    score = 1 / (1 + np.exp(-tokens_of(file) @ file["weights"][layer].T))
    k = file["experts"].shape[-1]
    chosen = np.sort(file["experts"][layer])
    unbiased = np.sort(np.argsort(-score)[:, :k])
    unlimited = np.sort(np.argsort(-(score + file["bias"][layer]))[:, :k])
    assert (chosen != unbiased).any()
    assert (chosen != unlimited).any() == (file["groups_per_token"][layer] < file["groups"][layer])
