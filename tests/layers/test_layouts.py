"""The layout matrix: every mesh, transport, router and dispatch gives what the serial layer gives.

Outputs, losses, statistics, expert biases and all gradients, per expert. `make test` runs a subset
in which every mesh, every dispatch and every router occurs; the others carry the marker `layouts`, and
`make test-layouts`, which CI calls next, runs all.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from moe_jax.dispatch.dropless import Dropless, Method
from moe_jax.dispatch.einsum import Einsum
from moe_jax.dispatch.exchange import Transport
from moe_jax.dispatch.gather import Gather
from moe_jax.layers.mode import Mode
from moe_jax.layers.moe import MoE, MoEConfig, TokenInfo
from moe_jax.models.abstract_model import arrays_of
from moe_jax.parallel.mesh import DATA, EXPERT, MODEL, TOKEN_AXES, MeshConfig, make_mesh
from moe_jax.routing.capacity import Capacity, CapacityRule
from moe_jax.routing.deepseek import DeepSeekV3
from moe_jax.routing.expert_choice import ExpertChoice
from moe_jax.routing.losses import Losses
from moe_jax.routing.soft import SoftMoE
from moe_jax.routing.token_choice import TopK
from tests.layers import serial

B, L, D, F, E, S = 8, 8, 8, 8, 16, 8
MESHES = [
    (1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 4, 1), (4, 2, 1), (2, 2, 2), (1, 4, 2), (1, 2, 4),
]  # fmt: skip
LOSSES = Losses(load_balancing=0.3, router_z=0.1)
# name -> router, capacity under which some choices are dropped, shared experts
ROUTERS = {
    "top-1": (TopK(k=1, losses=LOSSES), Capacity(train_factor=2.0), 0),
    "top-2": (TopK(k=2, losses=LOSSES), Capacity(train_factor=1.0), 0),
    # Fine-grained: 16 experts of which a token visits 4, chosen from 2 of 4 groups of experts.
    "DeepSeek-V3": (
        DeepSeekV3(
            k=4, groups=4, groups_per_token=2, bias_rate=0.1, losses=Losses(sequence_wise=0.3)
        ),
        Capacity(train_factor=1.0),
        1,
    ),
    "expert choice": (
        ExpertChoice(router_z_weight=0.1),
        Capacity(train_factor=2.0, rule=CapacityRule.EXPERT_CHOICE),
        0,
    ),
    "Soft MoE": (SoftMoE(slots_per_expert=2), Capacity(), 0),
}
DISPATCHES = {
    "slots, all_to_all": Gather(),
    "slots, ring": Gather(Transport.RING),
    "einsum": Einsum(),
    "dropless, ragged": Dropless(Transport.RAGGED),
    "dropless, all_to_all": Dropless(Transport.ALL_TO_ALL),
    "dropless, ring": Dropless(Transport.RING),
    # As on accelerators: sorted rows and grouped products.
    "dropless, ragged, grouped": Dropless(Transport.RAGGED, method=Method.GROUPED),
}
CASES = [
    case
    for case in itertools.product(MESHES, DISPATCHES, ROUTERS)
    if ROUTERS[case[2]][0].tokens_choose or not DISPATCHES[case[1]].dropless
]


def covering_subset(cases):
    """Greedily: the case with most meshes, dispatches and routers that did not occur yet."""
    missing = set().union(*(enumerate(case) for case in cases))
    chosen = []
    while missing:
        best = max(cases, key=lambda case: len(set(enumerate(case)) & missing))
        chosen.append(best)
        missing -= set(enumerate(best))
    return chosen


SUBSET = covering_subset(CASES)
X, COTANGENT = (jax.random.normal(jax.random.key(seed), (B, L, D)) for seed in (2, 3))
MASK = np.arange(B * L).reshape(B, L) % 11 != 5
INFO = TokenInfo(
    jnp.array(MASK),
    jnp.zeros((B, L), jnp.int32),
    jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32), (B, L)),
    jnp.broadcast_to(jnp.arange(B, dtype=jnp.int32)[:, None], (B, L)),
)


def config_of(dispatch, name):
    router, capacity, shared = ROUTERS[name]
    dispatch = DISPATCHES[dispatch]
    if dispatch.dropless:
        capacity = Capacity()
    config = MoEConfig(router, capacity, S, dispatch, shared_experts=shared)
    config.validate(E)
    return config


@functools.cache
def layer(dispatch, name):
    """A layer whose router decides; with V3, also a bias that matters."""
    model = MoE(config_of(dispatch, name), D, F, E, scale=1.0, key=jax.random.key(0))
    for i, value in enumerate((*model.router.values(), *model.router_state.values())):
        value[...] = value[...] + jax.random.normal(jax.random.key(i), value.shape)
    graph, _, _ = nnx.split(model, nnx.Param, ...)
    return graph, *arrays_of(model)


def weighted_losses(name, losses):
    weights = ROUTERS[name][0].loss_coefficients
    return sum((weights[key] * value for key, value in losses.items()), jnp.zeros(()))


def on_mesh(shape, dispatch, name):
    """Gradients, output, report and renewed variables, on a mesh with weights laid out over it."""
    graph, parameters, variables = layer(dispatch, name)
    specs = jax.tree.map(lambda _: PartitionSpec(), parameters)
    specs |= {
        "w_in": PartitionSpec(EXPERT, DATA, MODEL),
        "w_out": PartitionSpec(EXPERT, MODEL, DATA),
    }

    @jax.jit
    def differentiated(parameters, variables, x):
        def total(parameters, x):
            model = nnx.merge(graph, parameters, variables)
            y, report = model(x, INFO, Mode.TRAIN, None)
            value = jnp.sum(y * COTANGENT) + weighted_losses(name, report.losses)
            return value, (y, report, arrays_of(model)[1])

        return jax.grad(total, argnums=(0, 1), has_aux=True)(parameters, x)

    with jax.set_mesh(make_mesh(MeshConfig(*shape))):
        placed = jax.device_put(parameters, specs)
        x = jax.device_put(X, PartitionSpec(TOKEN_AXES))
        return jax.device_get(differentiated(placed, variables, x))


@functools.cache
def one_by_one(dropless, name):
    """The same without a mesh or a dispatch."""
    dispatch = "dropless, ragged" if dropless else "slots, all_to_all"
    config = config_of(dispatch, name)
    _, parameters, variables = layer(dispatch, name)

    @jax.jit
    def differentiated(parameters, x):
        def total(parameters, x):
            y, losses, statistics, assignment = serial.layer(
                config, parameters, variables, x, INFO, E
            )
            value = jnp.sum(y * COTANGENT) + weighted_losses(name, losses)
            return value, (y, losses, statistics, assignment)

        return jax.grad(total, argnums=(0, 1), has_aux=True)(parameters, x)

    return jax.device_get(differentiated(parameters, X))


def assert_close(got, want, name):
    """Relative to the size of the whole array."""
    error = np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-12)
    assert error < 1e-5, f"{name}: relative error {error:.1e}"


def assert_all_close(got, want, name):
    for (path, value), other in zip(
        jax.tree.leaves_with_path(want), jax.tree.leaves(got), strict=True
    ):
        assert_close(other, value, name + jax.tree_util.keystr(path))


def id_of(case):
    return "-".join(("x".join(map(str, case[0])), *case[1:])).replace(", ", "/").replace(" ", "_")


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=id_of(case), marks=() if case in SUBSET else pytest.mark.layouts)
        for case in CASES
    ],
)
def test_equals_the_serial_layer(case):
    _, dispatch, name = case
    (gradients, of_x), (y, report, renewed) = on_mesh(*case)
    dropless = DISPATCHES[dispatch].dropless
    (want_gradients, want_of_x), (want_y, losses, statistics, assignment) = one_by_one(
        dropless, name
    )
    assert_close(y, want_y, "output")
    assert_close(of_x, want_of_x, "gradient of x")
    for weight in ("w_in", "w_out"):
        for e in range(E):
            assert_close(gradients[weight][e], want_gradients[weight][e], f"{weight} of expert {e}")
    assert_all_close(gradients, want_gradients, "gradient of ")
    assert report.losses.keys() == losses.keys()
    assert_all_close(report.losses, losses, "loss ")
    for key, value in statistics.items():
        assert_close(report.statistics[key], value, key)
    if dropless:
        assert report.statistics["overflow"] == 0
        assert report.statistics["dropped"] == 0
    if name == "DeepSeek-V3":
        (bias,), (before,) = (jax.tree.leaves(v) for v in (renewed, layer(dispatch, name)[2]))
        load = np.bincount(assignment.experts[MASK].ravel(), minlength=E)
        np.testing.assert_allclose(bias, before + 0.1 * np.sign(load.mean() - load), rtol=1e-6)
        # One device's load would move other experts' biases.
        own = np.bincount(assignment.experts[0, MASK[0]].ravel(), minlength=E)
        assert (np.sign(load.mean() - load) != np.sign(own.mean() - own)).any()


@pytest.mark.parametrize("name", ["top-1", "top-2", "DeepSeek-V3"])
def test_capacity_drops_and_dropless_does_not(name):
    with_drops, without = (one_by_one(dropless, name)[1] for dropless in (False, True))
    assert 0.05 < with_drops[2]["dropped"] < 0.9
    assert without[2]["dropped"] == 0
    assert np.abs(with_drops[0] - without[0]).max() > 0.01


def test_how_many_cases_there_are():
    # 8 meshes times 7 dispatches times 3 routers through which tokens choose, and 3 dispatches
    # times the 2 others; the subset cannot be smaller than the number of meshes.
    assert len(CASES) == 8 * (7 * 3 + 3 * 2)
    assert 8 <= len(SUBSET) <= 10
