"""The layer on several meshes with routers that draw or loop, and what it reports when observed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from moe_jax.layers.mode import Mode
from moe_jax.layers.moe import MoE, MoEConfig, TokenInfo
from moe_jax.parallel.mesh import TOKEN_AXES, MeshConfig, make_mesh
from moe_jax.routing.balanced import BASE
from moe_jax.routing.capacity import Capacity
from moe_jax.routing.deepseek import DeepSeekV3
from moe_jax.routing.expert_choice import ExpertChoice
from moe_jax.routing.fixed import DrawnPer, UniformRandom
from moe_jax.routing.losses import Losses
from moe_jax.routing.noisy_top_k import NoisyTopK
from moe_jax.routing.priority import Priority
from moe_jax.routing.router import Mean

B, L, D, F, E, S = 8, 8, 8, 16, 8, 8
MASK = np.arange(B * L).reshape(B, L) % 11 != 5
X = jax.random.normal(jax.random.key(2), (B, L, D))
INFO = TokenInfo(
    jnp.array(MASK),
    jnp.zeros((B, L), jnp.int32),
    jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32), (B, L)),
    jnp.broadcast_to(jnp.arange(B, dtype=jnp.int32)[:, None], (B, L)),
)


def assert_close(got, want, name):
    error = np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-12)
    assert error < 1e-5, f"{name}: relative error {error:.1e}"


DRAWING = {
    "noisy top-k, random order": NoisyTopK(k=2, order=Priority.RANDOM),
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

    one, many = on((1, 1, 1)), on((2, 2, 2))
    for (path, want), got in zip(
        jax.tree.leaves_with_path(one), jax.tree.leaves(many), strict=True
    ):
        assert_close(got, want, jax.tree_util.keystr(path))
    draws = name in ("noisy top-k, random order", "one draw per batch")
    assert (np.abs(one[0] - on((1, 1, 1), seed=7)[0]).max() > 0.01) == draws


def test_observing_reports_where_every_token_went():
    router = DeepSeekV3(
        k=2, groups=4, groups_per_token=2, bias_rate=0.1, losses=Losses(sequence_wise=0.3)
    )
    config = MoEConfig(router, Capacity(train_factor=1.0), group_size=S)
    graph, state = nnx.split(MoE(config, D, F, E, scale=1.0, key=jax.random.key(0)))

    @jax.jit
    def observe(state, x):
        return nnx.merge(graph, state)(x, INFO, Mode.OBSERVE, None)[1]

    with jax.set_mesh(make_mesh(MeshConfig(2, 4, 1))):
        report = jax.device_get(observe(state, X))
    experts = report.routing.assignment.experts
    assert experts.shape == (B * L // S, S, 2)
    load = np.bincount(experts[MASK.reshape(-1, S)].ravel(), minlength=E) / MASK.sum()
    np.testing.assert_allclose(report.statistics["load"], load, rtol=1e-6)
    assert isinstance(report.routing.losses["sequence_wise"], Mean)
