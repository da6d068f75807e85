"""What the compiled MoE layer sends between devices, read from its HLO."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from moe_jax.analysis.accounting import statistics_bytes_per_layer
from moe_jax.layers.mode import Mode
from moe_jax.layers.moe import MoE, MoEConfig, TokenInfo
from moe_jax.parallel.mesh import DATA, EXPERT, MODEL, TOKEN_AXES, MeshConfig, make_mesh
from moe_jax.routing.capacity import Capacity
from moe_jax.routing.losses import Losses
from moe_jax.routing.token_choice import TopK

B, L, D, F, E, S = 8, 16, 32, 64, 8, 16
LOSSES = Losses(load_balancing=1e-2, router_z=1e-3)
C = 4  # S * K * factor / E with K = 2 and factor 1.
COLLECTIVE = re.compile(
    r"= (?P<result>.*?) (?P<name>all-to-all|all-gather|all-reduce|reduce-scatter|"
    r"collective-permute)(?:-start)?\(.*?replica_groups=(?P<groups>\{\{.*?\}\}|\[[\d,]+\]|mesh\[.*?\] \{.*?\})"
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """Attributes: name: the operation; elements: of its result, on one device."""

    name: str
    elements: int


def members(groups):
    """Devices that talk to each other, in the three ways that XLA's versions write groups."""
    if groups.startswith("{"):  # {{0,1,2,3},{4,5,6,7}}
        return groups[2:].split("}")[0].count(",") + 1
    if groups.startswith("["):  # [2,4]: two groups of four
        return int(groups[1:-1].split(",")[-1])
    mesh, axes = groups.split("]")  # mesh['data'=2,'expert'=4,'model'=1] {'data','expert'}
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh))
    return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", axes))


def collectives(hlo):
    """The collectives of a compiled program, without those that stay on one device."""
    found = []
    for match in COLLECTIVE.finditer(hlo):
        if members(match["groups"]) > 1:
            shapes = re.findall(r"\w+\[([\d,]*)\]", match["result"])
            sizes = [math.prod(int(n) for n in shape.split(",") if n) for shape in shapes]
            found.append(Collective(match["name"], sum(sizes)))
    return sorted(found, key=lambda c: (c.name, c.elements))


def compiled(shape, backward):
    """The HLO of the layer on a mesh with its weights sharded as in training."""
    config = MoEConfig(TopK(k=2, losses=LOSSES), Capacity(train_factor=1.0), group_size=S)
    graph, state = nnx.split(MoE(config, D, F, E, scale=1.0, key=jax.random.key(0)))
    ids = jnp.zeros((B, L), jnp.int32)

    def forward(parameters, x):
        info = TokenInfo(jnp.ones((B, L), bool), ids, ids, ids)
        return nnx.merge(graph, parameters)(x, info, Mode.TRAIN, None)

    def loss(parameters, x):
        y, report = forward(parameters, x)
        return jnp.sum(y**2) + sum(report.losses.values())

    with jax.set_mesh(make_mesh(MeshConfig(*shape))):
        specs = {
            "router": {"weights": PartitionSpec()},
            "w_in": PartitionSpec(EXPERT, DATA, MODEL),
            "w_out": PartitionSpec(EXPERT, MODEL, DATA),
        }
        parameters = jax.device_put(nnx.to_pure_dict(state), specs)
        x = jax.device_put(jnp.ones((B, L, D)), PartitionSpec(TOKEN_AXES))
        function = jax.grad(loss, argnums=(0, 1)) if backward else forward
        return jax.jit(function).lower(parameters, x).compile().as_text()


REPORT = Collective("all-reduce", statistics_bytes_per_layer(E, len(LOSSES.weights)) // 4)


@pytest.mark.parametrize("expert", [8, 4])
def test_expert_parallel_forward_is_two_exchanges_and_one_small_reduction(expert):
    # A device sends the E * C slots of its groups, whatever the number of devices.
    exchange = Collective("all-to-all", B // expert * E * C * D)
    assert collectives(compiled((1, expert, 1), backward=False)) == [REPORT, exchange, exchange]


def test_expert_parallel_backward_is_two_more_exchanges_and_the_routers_gradient():
    exchange = Collective("all-to-all", E * C * D)
    assert collectives(compiled((1, 8, 1), backward=True)) == [
        REPORT,
        Collective("all-reduce", D * E),
        *[exchange] * 4,
    ]


def test_sharded_weights_are_gathered_and_their_gradients_reduce_scattered():
    weights = E * D * F
    assert collectives(compiled((8, 1, 1), backward=True)) == [
        *[Collective("all-gather", weights)] * 2,
        REPORT,
        Collective("all-reduce", D * E),
        *[Collective("reduce-scatter", weights // 8)] * 2,
    ]


def test_tensor_parallel_reduces_tokens_not_buffers():
    # Forward the output; backward, combined into one, the gradients of the input and the K gates.
    assert collectives(compiled((1, 1, 8), backward=True)) == [
        Collective("all-reduce", B * L * D),
        Collective("all-reduce", B * L * (D + 2)),
    ]
