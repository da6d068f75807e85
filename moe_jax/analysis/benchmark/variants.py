"""What is measured: MoE layers by their dispatch, and the two floors.

Axis letters: T tokens, K choices per token, N = T * K assignments, S tokens per group, E experts,
C slots per expert, d width, f expert width.

A layer is a function of (parameters, x [T, d]) with outputs y [T, d] and the router's statistics;
all of them have the same parameters (`cases.parameters`) and the router TopK without losses. Their
order here is the order of tables and pictures.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.analysis.benchmark.cases import Shape
from moe_jax.analysis.floors import balanced, dense
from moe_jax.dispatch.dropless import Dropless
from moe_jax.dispatch.einsum import Einsum
from moe_jax.dispatch.gather import Gather
from moe_jax.dispatch.grouped_matmul.interface import Backend, GroupedMatmul
from moe_jax.dispatch.interface import Dispatch
from moe_jax.layers.mode import Mode
from moe_jax.layers.moe import MoE, MoEConfig, TokenInfo
from moe_jax.routing.capacity import Capacity
from moe_jax.routing.router import RouterInputs, Routing
from moe_jax.routing.statistics import load_evenness
from moe_jax.routing.token_choice import TopK

Layer = Callable[[Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]

DENSE, BALANCED = "dense", "balanced"
# What the einsum layers have, as GShard and Switch train.
EINSUM_CAPACITY = Capacity(train_factor=1.25)


def _gather(capacity_factor: float) -> Callable[[Shape], Layer]:
    """All tokens of the device compete for the same slots, so that nothing more is dropped."""
    capacity = Capacity(train_factor=capacity_factor)
    return lambda shape: moe_layer(shape, Gather(), shape.tokens, capacity)


def _einsum(group_size: int) -> Callable[[Shape], Layer]:
    return lambda shape: moe_layer(shape, Einsum(), group_size, EINSUM_CAPACITY)


def _dropless(backend: Backend) -> Callable[[Shape], Layer]:
    products = GroupedMatmul(forward=backend, lhs_gradient=backend, rhs_gradient=backend)
    return lambda shape: moe_layer(shape, Dropless(grouped_matmul=products), shape.tokens)


def all_experts(shape: Shape) -> Layer:
    """Every expert computes every token, and the combination leaves out what was not chosen."""

    def layer(parameters: Any, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        routing = route(shape, parameters["router"], x)
        assignment: Any = routing.assignment
        token = jnp.arange(shape.tokens)[:, None]
        gates = jnp.zeros((shape.tokens, shape.experts))
        gates = gates.at[token, assignment.experts].set(assignment.gates).astype(x.dtype)
        hidden = jax.nn.relu(jnp.einsum("td,edf->etf", x, parameters["w_in"].astype(x.dtype)))
        outputs = jnp.einsum("etf,efd->etd", hidden, parameters["w_out"].astype(x.dtype))
        return jnp.einsum("etd,te->td", outputs, gates), statistics_of(routing)

    return layer


VARIANTS: dict[str, Callable[[Shape], Layer]] = {
    "gather_cf1.0": _gather(1.0),
    "gather_cf1.25": _gather(1.25),
    "gather_cf2.0": _gather(2.0),
    "dropless": _dropless(Backend.AUTO),
    "einsum_g256": _einsum(256),
    "einsum_g2048": _einsum(2048),
    "ragged_dot": _dropless(Backend.RAGGED_DOT),
    "all_experts": all_experts,
}


def moe_layer(
    shape: Shape, dispatch: Dispatch, group_size: int, capacity: Capacity | None = None
) -> Layer:
    """The layer of `moe_jax.layers.moe` as in training, on one device.

    Args:
      shape: of the layer.
      dispatch: the component under test.
      group_size: S, which divides T.
      capacity: of dispatch with slots; None for dropless.
    """
    config = MoEConfig(
        router=TopK(k=shape.k),
        capacity=capacity or Capacity(),
        group_size=group_size,
        dispatch=dispatch,
    )
    graph, _ = nnx.split(
        nnx.eval_shape(
            lambda: MoE(config, shape.width, shape.mlp_width, shape.experts, 1.0, jax.random.key(0))
        )
    )
    info = TokenInfo.of(jnp.zeros((1, shape.tokens), jnp.int32))

    def layer(parameters: Any, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        y, report = nnx.merge(graph, parameters)(x[None], info, Mode.TRAIN, None)
        return y[0], report.statistics

    return layer


def route(shape: Shape, parameters: dict[str, jax.Array], x: jax.Array) -> Routing:
    """What the layers' router does with all tokens as one group and no limit on slots.

    Args:
      shape: of the layer.
      parameters: the router's.
      x: [T, d].
    """
    whole = jnp.zeros(shape.tokens, jnp.int32)
    key = jax.random.key(0)
    inputs = RouterInputs(x, whole == 0, whole, whole, whole, key, key, True)
    return TopK(k=shape.k).route(parameters, inputs, shape.experts, shape.tokens)


def statistics_of(routing: Routing) -> dict[str, jax.Array]:
    """As the layer reports them."""
    values = {name: mean.value() for name, mean in routing.statistics.items()}
    return values | load_evenness(values["load"])


def dense_floor(parameters: Any, rows: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`parameters`: {"w_in": [d, f], "w_out": [f, d]}; rows [N, d] to [N, d]."""
    return dense.apply(rows, parameters["w_in"], parameters["w_out"]), {}


def balanced_floor(parameters: Any, rows: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`parameters`: {"w_in": [E, d, f], "w_out": [E, f, d]}; rows [E, N/E, d] to [E, N/E, d]."""
    return balanced.apply(rows, parameters["w_in"], parameters["w_out"]), {}
