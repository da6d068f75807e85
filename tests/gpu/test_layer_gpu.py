"""The dropless layer compiled for GPUs. Run by `make test-gpu`."""

import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from moe_jax.analysis.hlo import Program
from moe_jax.dispatch.dropless import Dropless
from moe_jax.layers.mode import Mode
from moe_jax.layers.moe import MoE, MoEConfig, TokenInfo
from moe_jax.parallel.mesh import EXPERT
from moe_jax.routing.token_choice import TopK
from tests.gpu.programs import MOSAIC, TRITON, array, compiled, gpus, kernels

pytestmark = pytest.mark.gpu

DEVICES, WIDTH, EXPERTS, LENGTH, ROWS = 4, 256, 16, 256, 12


@pytest.fixture(scope="module")
def text():
    """The compiled gradients of all arguments, over 4 H100 along `expert`."""
    mesh = gpus("h100:1x4", expert=DEVICES)
    config = MoEConfig(TopK(k=2), group_size=LENGTH, dispatch=Dropless())
    config.validate(EXPERTS)
    graph, state = nnx.split(
        nnx.eval_shape(lambda: MoE(config, WIDTH, 4 * WIDTH, EXPERTS, 1.0, jax.random.key(0)))
    )
    placement = {"w_in": PartitionSpec(EXPERT), "w_out": PartitionSpec(EXPERT)}
    parameters = {
        name: jax.tree.map(
            lambda leaf, name=name: array(
                mesh, leaf.dtype, *leaf.shape, spec=placement.get(name, PartitionSpec())
            ),
            value,
        )
        for name, value in nnx.to_pure_dict(state).items()
    }

    def loss(parameters, x):
        info = TokenInfo.of(jnp.zeros(x.shape[:2], jnp.int32))
        y, _ = nnx.merge(graph, parameters)(x, info, Mode.TRAIN, None)
        return jnp.sum(y.astype(jnp.float32) ** 2)

    x = array(mesh, jnp.bfloat16, ROWS, LENGTH, WIDTH, spec=PartitionSpec(EXPERT))
    return compiled(mesh, jax.grad(loss, argnums=(0, 1)), parameters, x).as_text() or ""


def test_experts_are_kernels_on_their_own_rows(text):
    # Two products, each with its gradients of the rows and of the matrices.
    found = kernels(text)
    assert len(found) == 6 and set(found) <= {MOSAIC, TRITON}
    # With a dense product every one of a device's experts would have all its rows.
    rows = ROWS * LENGTH * 2 // DEVICES
    dense = re.findall(rf"\w+\[{EXPERTS // DEVICES},(\d+),\d\d+\]", text)
    assert not [size for size in dense if int(size) >= rows]


def test_tokens_travel_raggedly_and_are_gathered_nowhere(text):
    found = Program(text).collectives()
    # Rows there and back, and their gradients, at least.
    assert sum(one.name == "ragged-all-to-all" for one in found) >= 4
    tokens = ROWS * LENGTH // DEVICES
    gathered = [one for one in found if one.name == "all-gather"]
    assert all(one.elements < tokens for one in gathered), "tokens are gathered"


def test_the_router_multiplies_in_float32(text):
    """A product of float32 whose precision is not the highest is computed in tf32."""
    products = re.findall(r"^.* = f32\[[^=]*(?: dot\(|__cublas\$).*$", text, re.MULTILINE)
    routers = [line for line in products if "router" in line]
    # The scores, and the gradients of the tokens and of the weights.
    assert len(routers) >= 3
    for line in routers:
        assert re.search(r"operand_precision=\{highest,highest\}|HIGHEST.*HIGHEST", line), line
