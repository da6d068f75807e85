"""The layer on several meshes with other routers than top-k: values, gradients, expert bias."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from moe_jax.layers.mode import Mode
from moe_jax.layers.moe import MoE, MoEConfig, TokenInfo
from moe_jax.models.definition import numbers_of
from moe_jax.parallel.mesh import DATA, EXPERT, MODEL, TOKEN_AXES, MeshConfig, make_mesh
from moe_jax.routing.assignment import (
    ExpertAssignment,
    Mean,
    RouterInputs,
    SoftAssignment,
)
from moe_jax.routing.balanced import BASE
from moe_jax.routing.capacity import Capacity
from moe_jax.routing.deepseek import DeepSeekV3
from moe_jax.routing.expert_choice import ExpertChoice
from moe_jax.routing.fixed import DrawnPer, UniformRandom
from moe_jax.routing.losses import Losses
from moe_jax.routing.noisy_top_k import NoisyTopK
from moe_jax.routing.service import ServiceOrder
from moe_jax.routing.soft import SoftMoE

B, L, D, F, E, S = 8, 8, 8, 16, 8, 8
MASK = np.arange(B * L).reshape(B, L) % 11 != 5
ROUTERS = {
    "DeepSeek-V3": DeepSeekV3(
        k=2, groups=4, groups_per_token=2, bias_rate=0.1, losses=Losses(sequence_wise=0.3)
    ),
    "expert choice": ExpertChoice(router_z_weight=0.1),
    "Soft MoE": SoftMoE(slots_per_expert=2),
}
CONFIGS = {
    name: MoEConfig(
        router, Capacity(train_factor=2.0 if router.choices == 1 else 1.0), group_size=S
    )
    for name, router in ROUTERS.items()
}
MESHES = [(1, 1, 1), (2, 4, 1), (2, 2, 2)]
X, COTANGENT = (jax.random.normal(jax.random.key(seed), (B, L, D)) for seed in (2, 3))
INFO = TokenInfo(
    jnp.array(MASK),
    jnp.zeros((B, L), jnp.int32),
    jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32), (B, L)),
    jnp.broadcast_to(jnp.arange(B, dtype=jnp.int32)[:, None], (B, L)),
)


@functools.cache
def layer(name):
    """A layer whose router decides; with V3, also a bias that matters."""
    model = MoE(CONFIGS[name], D, F, E, scale=1.0, key=jax.random.key(0))
    for i, value in enumerate((*model.router.values(), *model.router_state.values())):
        value[...] = value[...] + jax.random.normal(jax.random.key(i), value.shape)
    graph, _, _ = nnx.split(model, nnx.Param, ...)
    return graph, *numbers_of(model)


def weighted_losses(name, losses):
    weights = ROUTERS[name].loss_weights
    return sum((weights[key] * value for key, value in losses.items()), jnp.zeros(()))


@functools.partial(jax.jit, static_argnums=0)
def differentiated(name, parameters, variables, x):
    def total(parameters, x):
        model = nnx.merge(layer(name)[0], parameters, variables)
        y, report = model(x, INFO, Mode.TRAIN, None)
        value = jnp.sum(y * COTANGENT) + weighted_losses(name, report.losses)
        return value, (y, report, numbers_of(model)[1])

    return jax.grad(total, argnums=(0, 1), has_aux=True)(parameters, x)


@functools.cache
def run_on(name, shape):
    _, parameters, variables = layer(name)
    specs = jax.tree.map(lambda _: PartitionSpec(), parameters)
    specs |= {
        "w_in": PartitionSpec(EXPERT, DATA, MODEL),
        "w_out": PartitionSpec(EXPERT, MODEL, DATA),
    }
    with jax.set_mesh(make_mesh(MeshConfig(*shape))):
        placed = jax.device_put(parameters, specs)
        x = jax.device_put(X, PartitionSpec(TOKEN_AXES))
        return jax.device_get(differentiated(name, placed, variables, x))


@functools.cache
def by_loop(name):
    """Each group and expert alone, in plain arithmetic; only `route` is the package's."""
    _, parameters, variables = layer(name)
    router, arrays = ROUTERS[name], {**parameters["router"], **variables.get("router_state", {})}

    def expert(parameters, e, rows):
        return jnp.maximum(rows @ parameters["w_in"][e], 0) @ parameters["w_out"][e]

    def total(parameters, x):
        y, routings = [], []
        for g in range(B):
            inputs = RouterInputs(
                x[g], INFO.mask[g], INFO.token_ids[g], INFO.positions[g], INFO.sequence_ids[g],
                jax.random.key(0), jax.random.key(0), True,
            )  # fmt: skip
            routing = router.route(
                arrays | parameters["router"], inputs, E, CONFIGS[name].slots(E, True)
            )
            routings.append(routing)
            y.append(combined(routing.assignment, x[g], functools.partial(expert, parameters)))
        losses = jax.tree.map(lambda *a: sum(a), *[routing.losses for routing in routings])
        values = {key: mean.value() for key, mean in losses.items()}
        y = jnp.stack(y)
        return jnp.sum(y * COTANGENT) + weighted_losses(name, values), (y, values, routings)

    (parameter_gradients, x_gradient), (y, values, routings) = jax.jit(
        jax.grad(total, argnums=(0, 1), has_aux=True)
    )(parameters, X)
    return jax.device_get((parameter_gradients, x_gradient, y, values, routings))


def combined(assigned, x, expert):
    y = [jnp.zeros(D)] * S
    if isinstance(assigned, SoftAssignment):
        for e in range(E):
            outputs = expert(e, assigned.dispatch[:, e].T @ x)
            y = [y[s] + assigned.combine[s, e] @ outputs for s in range(S)]
        return jnp.stack(y)
    for e in range(E):
        outputs = expert(e, x)
        if isinstance(assigned, ExpertAssignment):
            # One row of weights per expert; an empty slot has token S and falls off the end.
            hits = assigned.tokens[e][:, None] == jnp.arange(S)
            weights = jnp.sum(jnp.where(hits, assigned.gates[e][:, None], 0.0), axis=0)
        else:
            served = (assigned.experts == e) & (assigned.slots < assigned.capacity)
            weights = jnp.sum(jnp.where(served, assigned.gates, 0.0), axis=1)
        y = [y[s] + weights[s] * outputs[s] for s in range(S)]
    return jnp.stack(y)


def assert_close(got, want, name):
    error = np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-12)
    assert error < 1e-5, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("name", ROUTERS)
def test_equals_the_loop_over_groups_and_experts(name):
    (gradients, x_gradient), (y, report, _) = run_on(name, (1, 1, 1))
    want_gradients, want_x, want_y, want_losses, _ = by_loop(name)
    assert_close(y, want_y, "output")
    assert_close(x_gradient, want_x, "gradient of x")
    assert report.losses.keys() == want_losses.keys()
    for key, value in want_losses.items():
        assert_close(report.losses[key], value, key)
    for e in range(E):
        assert_close(gradients["w_in"][e], want_gradients["w_in"][e], f"w_in of {e}")
        assert_close(gradients["w_out"][e], want_gradients["w_out"][e], f"w_out of {e}")
    for key, value in want_gradients["router"].items():
        assert_close(gradients["router"][key], value, f"router {key}")


@pytest.mark.parametrize("shape", MESHES[1:], ids=str)
@pytest.mark.parametrize("name", ROUTERS)
def test_every_mesh_equals_one_device(name, shape):
    one, many = run_on(name, MESHES[0]), run_on(name, shape)
    leaves = zip(jax.tree.leaves_with_path(one), jax.tree.leaves(many), strict=True)
    for (path, want), got in leaves:
        assert_close(got, want, jax.tree_util.keystr(path))


DRAWING = {
    "noisy top-k, random order": NoisyTopK(k=2, order=ServiceOrder.RANDOM),
    "one draw per batch": UniformRandom(per=DrawnPer.BATCH),
    "BASE": BASE(),
    "capped expert choice": ExpertChoice(cap=2),
}


@pytest.mark.parametrize("name", DRAWING)
def test_draws_and_loops_do_not_depend_on_the_mesh(name):
    """Routers with keys, and with loops whose state must vary over the devices."""
    config = MoEConfig(DRAWING[name], Capacity(train_factor=1.0), group_size=S)
    model = MoE(config, D, F, E, scale=1.0, key=jax.random.key(0))
    for i, value in enumerate(model.router.values()):
        value[...] = jax.random.normal(jax.random.key(i), value.shape)
    graph, state = nnx.split(model)

    @jax.jit
    def run(x, key):
        return nnx.merge(graph, state)(x, INFO, Mode.TRAIN, key)

    def on(shape, seed=5):
        with jax.set_mesh(make_mesh(MeshConfig(*shape))):
            x = jax.device_put(X, PartitionSpec(TOKEN_AXES))
            return jax.device_get(run(x, jax.random.key(seed)))

    one, many = on(MESHES[0]), on(MESHES[2])
    for (path, want), got in zip(
        jax.tree.leaves_with_path(one), jax.tree.leaves(many), strict=True
    ):
        assert_close(got, want, jax.tree_util.keystr(path))
    draws = name in ("noisy top-k, random order", "one draw per batch")
    assert (np.abs(one[0] - on(MESHES[0], seed=7)[0]).max() > 0.01) == draws


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_the_expert_bias_follows_the_sign_of_the_global_batchs_load(shape):
    _, (_, _, renewed) = run_on("DeepSeek-V3", shape)
    (bias,) = jax.tree.leaves(renewed)
    (before,) = jax.tree.leaves(layer("DeepSeek-V3")[2])
    routings = by_loop("DeepSeek-V3")[-1]
    counts = sum(np.bincount(np.asarray(r.assignment.experts)[MASK[g]].ravel(), minlength=E)
                 for g, r in enumerate(routings))  # fmt: skip
    np.testing.assert_allclose(bias, before + 0.1 * np.sign(counts.mean() - counts), rtol=1e-6)
    one_shard = np.bincount(
        np.asarray(routings[0].assignment.experts)[MASK[0]].ravel(), minlength=E
    )
    assert (np.sign(counts.mean() - counts) != np.sign(one_shard.mean() - one_shard)).any()


def test_observing_reports_where_every_token_went():
    graph, parameters, variables = layer("DeepSeek-V3")

    @jax.jit
    def observe(parameters, variables, x):
        return nnx.merge(graph, parameters, variables)(x, INFO, Mode.OBSERVE, None)[1]

    with jax.set_mesh(make_mesh(MeshConfig(2, 4, 1))):
        report = jax.device_get(observe(parameters, variables, X))
    experts = report.routing.assignment.experts
    assert experts.shape == (B * L // S, S, 2)
    load = np.bincount(experts[MASK.reshape(-1, S)].ravel(), minlength=E) / MASK.sum()
    np.testing.assert_allclose(report.statistics["load"], load, rtol=1e-6)
    assert isinstance(report.routing.losses["sequence_wise"], Mean)
