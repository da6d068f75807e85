"""Experts that are any NNX module: equal to the feed-forward form that they imitate, and refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.analysis.accounting.machine import Machine
from moe_jax.analysis.accounting.moe_products import of_moe
from moe_jax.dispatch.dropless import Dropless
from moe_jax.dispatch.einsum import Einsum
from moe_jax.dispatch.exchange import Transport
from moe_jax.dispatch.gather import Gather
from moe_jax.errors import UserError
from moe_jax.layers.expert_form import ModuleForm
from moe_jax.layers.moe import MoE, MoEConfig
from moe_jax.parallel.mesh import make_mesh
from moe_jax.routing.token_choice import TopK

D, F, E = 16, 32, 4


class TwoMatrices(nnx.Module):
    """relu(x W) V without biases, as `FeedForwardForm` by default."""

    def __init__(self, width: int, mlp_width: int, key: jax.Array) -> None:
        self.up = nnx.Linear(width, mlp_width, use_bias=False, rngs=nnx.Rngs(key))
        self.down = nnx.Linear(mlp_width, width, use_bias=False, rngs=nnx.Rngs(key))

    def __call__(self, rows: jax.Array) -> jax.Array:
        return self.down(jax.nn.relu(self.up(rows)))


@dataclasses.dataclass
class TwoMatricesForm(ModuleForm):
    def build(self, width: int, mlp_width: int, key: jax.Array) -> nnx.Module:
        return TwoMatrices(width, mlp_width, key)


@dataclasses.dataclass
class Counting(ModuleForm):
    """Its module has a variable that is no parameter."""

    def build(self, width: int, mlp_width: int, key: jax.Array) -> nnx.Module:
        return nnx.BatchNorm(width, rngs=nnx.Rngs(key))


def twins(config: MoEConfig) -> tuple[MoE, MoE]:
    """A layer of modules and one of the feed-forward form, with the same weights."""
    key = jax.random.key(0)
    of_modules = MoE(dataclasses.replace(config, experts=TwoMatricesForm()), D, F, E, key=key)
    ours = MoE(config, D, F, E, key=key)
    ours.w_in[...] = of_modules.experts["expert_up_kernel"][...]
    ours.w_out[...] = of_modules.experts["expert_down_kernel"][...]
    return of_modules, ours


@pytest.mark.parametrize("mesh", ["data:1", "data:2,expert:4", "expert:2,model:2"])
@pytest.mark.parametrize(
    "dispatch",
    [Gather(), Gather(transport=Transport.RING), Einsum()],
    ids=["gather", "ring", "einsum"],
)
def test_modules_equal_the_form_that_they_imitate(mesh, dispatch):
    config = MoEConfig(router=TopK(k=2), dispatch=dispatch)
    x = jax.random.normal(jax.random.key(1), (8, 8, D))
    with jax.set_mesh(make_mesh(mesh)):
        of_modules, ours = twins(config)

        def loss(layer: MoE, x: jax.Array) -> jax.Array:
            y, report = layer(x)
            return jnp.sum(jnp.sin(y)) + report.losses.get("router_z", 0.0)

        got, expected = of_modules(x)[0], ours(x)[0]
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
        got, expected = (nnx.grad(loss)(layer, x) for layer in (of_modules, ours))
    pairs = [("expert_up_kernel", "w_in"), ("expert_down_kernel", "w_out")]
    for theirs, own in pairs:
        np.testing.assert_allclose(got[theirs][...], expected[own][...], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        got["router"]["weights"][...], expected["router"]["weights"][...], rtol=1e-4, atol=1e-5
    )


def test_experts_are_drawn_apart():
    layer = MoE(MoEConfig(experts=TwoMatricesForm()), D, F, E, key=jax.random.key(0))
    kernels = layer.experts["expert_up_kernel"][...]
    assert kernels.shape == (E, D, F)
    assert len({float(kernel[0, 0]) for kernel in kernels}) == E


def test_a_module_counts_a_product_with_each_of_its_arrays():
    machine = Machine("cpu", make_mesh("data:1").shape)
    counted = []
    for layer in twins(MoEConfig(router=TopK(k=1), group_size=16)):
        shapes = {name: array[...] for name, array in layer.experts.items()}
        shapes["router"] = {name: array[...] for name, array in layer.router.items()}
        products = of_moe(layer.config, E, D, shapes, 64, machine)
        counted.append(sum(product.flops for product in products))
    assert counted[0] == counted[1] > 0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"dispatch": Dropless()}, "works on slots only, but moe.dispatch is Dropless; use"),
        ({"expert_layers": 2}, "moe.expert_layers is 2, but moe.experts is TwoMatricesForm"),
        ({"expert_dropout": 0.1}, "moe.expert_dropout is 0.1"),
        ({"shared_experts": 1}, "moe.shared_experts is 1"),
    ],
)
def test_what_a_module_cannot_do_is_refused(change, named):
    config = dataclasses.replace(MoEConfig(experts=TwoMatricesForm()), **change)
    with pytest.raises(UserError, match=named):
        config.validate(E)


def test_a_module_with_other_variables_is_refused():
    with pytest.raises(UserError, match=r"moe\.experts is Counting, whose module has expert_mean"):
        MoE(MoEConfig(experts=Counting()), D, F, E, key=jax.random.key(0))
