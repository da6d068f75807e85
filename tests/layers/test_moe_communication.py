"""What the compiled MoE layer sends between devices and keeps in memory, read from its HLO."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from moe_jax.analysis.accounting.stack import statistics_bytes_per_layer
from moe_jax.analysis.hlo import Program
from moe_jax.dispatch.dropless import Dropless
from moe_jax.dispatch.exchange import Transport, Wire
from moe_jax.dispatch.gather import Gather
from moe_jax.layers.mode import Mode
from moe_jax.layers.moe import MoE, MoEConfig, TokenInfo
from moe_jax.parallel.mesh import DATA, EXPERT, MODEL, TOKEN_AXES, MeshConfig, make_mesh
from moe_jax.routing.capacity import Capacity
from moe_jax.routing.losses import Losses
from moe_jax.routing.token_choice import TopK

B, L, D, F, E, S, K = 8, 16, 32, 64, 8, 16, 2
LOSSES = Losses(load_balancing=1e-2, router_z=1e-3)
C = 4  # S * K * factor / E with factor 1.


def program(*args, **options):
    """The layer compiled for a mesh with its weights sharded as in training."""
    return lowered(*args, **options).compile()


def lowered(shape, backward, dispatch=None, width=D, mlp_width=F, num_experts=E, length=L):
    """The layer lowered for a mesh with its weights sharded as in training."""
    dispatch = dispatch or Gather()
    capacity = Capacity() if dispatch.dropless else Capacity(train_factor=1.0)
    config = MoEConfig(TopK(k=K, losses=LOSSES), capacity, S, dispatch)
    graph, state = nnx.split(
        nnx.eval_shape(
            lambda: MoE(config, width, mlp_width, num_experts, scale=1.0, key=jax.random.key(0))
        )
    )
    ids = jnp.zeros((B, length), jnp.int32)

    def forward(parameters, x):
        info = TokenInfo(jnp.ones((B, length), bool), ids, ids, ids)
        return nnx.merge(graph, parameters)(x, info, Mode.TRAIN, None)

    def loss(parameters, x):
        y, report = forward(parameters, x)
        return jnp.sum(y**2) + sum(report.losses.values())

    mesh = make_mesh(MeshConfig(*shape))

    def placed(array, *axes):
        sharding = jax.sharding.NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    with jax.set_mesh(mesh):
        parameters = nnx.to_pure_dict(state)
        parameters = {
            "router": {"weights": placed(parameters["router"]["weights"])},
            "w_in": placed(parameters["w_in"], EXPERT, DATA, MODEL),
            "w_out": placed(parameters["w_out"], EXPERT, MODEL, DATA),
        }
        x = placed(jax.ShapeDtypeStruct((B, length, width), jnp.float32), TOKEN_AXES)
        function = jax.grad(loss, argnums=(0, 1)) if backward else forward
        return jax.jit(function).lower(parameters, x)


def collectives(*args, **options):
    """(kind, elements of the result on one device), sorted."""
    found = Program(program(*args, **options).as_text() or "").collectives()
    return sorted((c.name, c.elements) for c in found)


# A dropless layer also counts the overflow, as a (sum, count) pair.
REPORT = ("all-reduce", statistics_bytes_per_layer(E, len(LOSSES.coefficients)) // 4)
DROPLESS_REPORT = ("all-reduce", REPORT[1] + 2)
ROUTER = ("all-reduce", D * E)


@pytest.mark.parametrize("expert", [8, 4])
def test_expert_parallel_forward_is_two_exchanges_and_one_small_reduction(expert):
    # A device sends the E * C slots of its groups, whatever the number of devices.
    exchange = ("all-to-all", B // expert * E * C * D)
    assert collectives((1, expert, 1), backward=False) == [REPORT, exchange, exchange]


def test_expert_parallel_backward_is_two_more_exchanges_and_the_routers_gradient():
    exchange = ("all-to-all", E * C * D)
    assert collectives((1, 8, 1), backward=True) == [REPORT, ROUTER, *[exchange] * 4]


def test_sharded_weights_are_gathered_and_their_gradients_reduce_scattered():
    weights = E * D * F
    assert collectives((8, 1, 1), backward=True) == [
        *[("all-gather", weights)] * 2,
        REPORT,
        ROUTER,
        *[("reduce-scatter", weights // 8)] * 2,
    ]


def test_tensor_parallel_reduces_tokens_not_buffers():
    # Forward the output; backward, combined into one, the gradients of the input and the K gates.
    assert collectives((1, 1, 8), backward=True) == [
        ("all-reduce", B * L * D),
        ("all-reduce", B * L * (D + K)),
    ]


T = B * L // 8  # Tokens of one of 8 devices.


def test_ring_gathers_tokens_once_and_scatters_sums_once():
    # Tokens, and what they chose: experts, slots and gates of K choices. Backward the other way
    # round: the output's gradient is gathered, those of the tokens and the gates are scattered.
    small = [("all-gather", 8 * T * K)] * 3
    assert collectives((1, 8, 1), True, Gather(Transport.RING)) == sorted([
        ("all-gather", 8 * T * D), ("all-gather", 8 * T * D), *small,
        REPORT, ROUTER,
        ("reduce-scatter", T * D), ("reduce-scatter", T * D), ("reduce-scatter", T * K),
    ])  # fmt: skip


def test_dropless_all_to_all_sends_each_token_once_to_a_device():
    rows = 8 * T  # Room for all tokens from every device.
    there, back = ("all-to-all", rows * D), ("all-to-all", rows * D)
    gates, numbers = ("all-to-all", rows * K), ("all-to-all", rows * (K + 1))
    assert collectives((1, 8, 1), True, Dropless(Transport.ALL_TO_ALL)) == sorted(
        [DROPLESS_REPORT, ROUTER, there, back, gates, numbers, there, back, gates]
    )


def test_buffers_shrink_with_their_factor():
    # At balance 8 devices get K copies of T tokens, so each peer's buffer is T * K / 8 rows.
    rows = 8 * int(np.ceil(1.5 * T * K / 8))
    found = collectives((1, 8, 1), False, Dropless(Transport.ALL_TO_ALL, buffer_factor=1.5))
    assert found.count(("all-to-all", rows * D)) == 2
    assert not any(name == "all-gather" for name, _ in found)


@pytest.mark.parametrize("dispatch", [Gather, Dropless])
@pytest.mark.parametrize("transport", [Transport.ALL_TO_ALL, Transport.RING])
def test_rows_travel_in_bfloat16_if_asked(dispatch, transport):
    # As lowered: XLA's CPU backend widens them again.
    text = lowered((1, 8, 1), True, dispatch(transport, Wire.BFLOAT16)).as_text()
    kinds = r'"stablehlo\.(?:all_to_all|all_gather|reduce_scatter)"'
    sent = re.findall(kinds + r".*?\) -> tensor<([\dx]+)x(\w+)>", text, flags=re.DOTALL)
    rows = [dtype for dims, dtype in sent if dims.endswith(f"x{D}")]
    assert len(rows) >= 3 and set(rows) == {"bf16"}
    assert {dtype for dims, dtype in sent if not dims.endswith(f"x{D}")} <= {"f32", "i32"}


def largest_array(text):
    """Elements of the largest array anywhere in a program."""
    shapes = re.findall(r"\b(?:f32|bf16|s32|pred|u32)\[([\d,]+)\]", text)
    return max(np.prod([int(n) for n in shape.split(",")]) for shape in shapes)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 8, 1)], ids=str)
def test_dropless_has_no_buffer_of_experts_times_tokens_times_width(shape):
    experts, length = 64, 256
    tokens = B * length // shape[1]
    text = program(
        shape, True, Dropless(Transport.ALL_TO_ALL), num_experts=experts, length=length
    ).as_text()
    # Room for every choice of all devices' tokens, and slots a little above the mean load.
    rows = 1.2 * shape[1] * tokens * K
    assert largest_array(text) <= rows * F < experts * tokens * D


@functools.cache
def working_memory(num_experts):
    """Bytes of temporaries without the weights' gradients, which are results; one device."""
    compiled = program(
        (1, 1, 1), True, Dropless(), width=256, mlp_width=1024, num_experts=num_experts, length=1024
    )
    return compiled.memory_analysis().temp_size_in_bytes


def test_temporaries_do_not_grow_with_the_number_of_experts():
    assert working_memory(64) == pytest.approx(working_memory(8), rel=0.1)
