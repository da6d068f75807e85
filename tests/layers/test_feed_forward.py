"""Every form of feed-forward network, dense and as experts, against the formulas in NumPy."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.dispatch.dropless import Dropless, Method
from moe_jax.dispatch.gather import Gather
from moe_jax.layers.feed_forward import Activation, FeedForward, FeedForwardForm, HiddenBias
from moe_jax.layers.mode import Mode
from moe_jax.layers.moe import MoE, MoEConfig, TokenInfo
from moe_jax.models.abstract_model import AbstractModel
from moe_jax.parallel.mesh import MeshConfig, make_mesh
from moe_jax.parallel.sharding import parameter_shardings
from moe_jax.routing.capacity import Capacity, CapacityRule
from moe_jax.routing.token_choice import TopK

B, L, D, F, E = 4, 8, 8, 16, 4
GATED = FeedForwardForm(Activation.SILU, gated=True)
FORMS = [
    GATED,
    FeedForwardForm(Activation.GELU_EXACT, bias=True),
    FeedForwardForm(Activation.GELU, gated=True, bias=True, hidden_bias=HiddenBias.ADDITIVE),
    FeedForwardForm(Activation.RELU, gated=True, hidden_bias=HiddenBias.MULTIPLICATIVE),
]


def by_formula(form: FeedForwardForm, weights: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    def linear(name, rows):
        y = rows @ weights[f"w_{name}"]
        return y + weights[f"b_{name}"] if form.bias else y

    activation = {
        Activation.RELU: lambda v: np.maximum(v, 0),
        Activation.SILU: lambda v: v / (1 + np.exp(-v)),
        Activation.GELU_EXACT: lambda v: v * (1 + np.vectorize(math.erf)(v / math.sqrt(2))) / 2,
        Activation.GELU: lambda v: 0.5 * v * (1 + np.tanh(0.7978845608 * (v + 0.044715 * v**3))),
    }[form.activation]
    hidden = activation(linear("gate", x)) * linear("in", x) if form.gated else None
    hidden = activation(linear("in", x)) if hidden is None else hidden
    if form.hidden_bias == HiddenBias.ADDITIVE:
        hidden = hidden + weights["b_hidden"]
    elif form.hidden_bias == HiddenBias.MULTIPLICATIVE:
        hidden = hidden * weights["b_hidden"]
    return linear("out", hidden)


def drawn(shapes):
    """Numbers for a tree of parameters; biases are not 0, where they would change nothing."""
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(5), len(leaves))
    values = [0.5 * jax.random.normal(k, s.shape) for k, s in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, values)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_dense_layer_follows_the_formula(form):
    @dataclasses.dataclass
    class Config:
        def build(self, key):
            return FeedForward(D, F, form, 0.0, 1.0, key)

    abstract_model = AbstractModel.of(Config())
    weights = drawn(abstract_model.shapes)
    x = jax.random.normal(jax.random.key(0), (B, L, D))
    y = abstract_model.merge(weights)(x, None)
    np.testing.assert_allclose(
        y, by_formula(form, jax.tree.map(np.asarray, weights), x), rtol=1e-4, atol=1e-5
    )


@dataclasses.dataclass
class LayerConfig:
    moe: MoEConfig

    def build(self, key):
        return MoE(self.moe, D, F, E, 1.0, key)


def apply(abstract_model, weights, x, mesh):
    """Output, and gradients of its weighted sum, on a mesh."""
    info = TokenInfo.of(jnp.zeros((B, L), jnp.int32))
    weighting = jax.random.normal(jax.random.key(9), x.shape)

    def loss(weights, x):
        y, _ = abstract_model.merge(weights)(x, info, Mode.EVALUATE, None)
        return (y * weighting).sum(), y

    mesh = make_mesh(mesh)
    with jax.set_mesh(mesh):
        shardings = parameter_shardings(abstract_model.shapes, abstract_model.axes, mesh, 1)
        weights = jax.tree.map(jax.device_put, weights, shardings)
        (_, y), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(
            weights, x
        )
    return jax.device_get((y, gradients))


DISPATCHES = {
    "gather": Gather(),
    "spill": Dropless(method=Method.SPILL),
    "grouped": Dropless(method=Method.GROUPED),
}


@pytest.mark.parametrize(
    ("form", "dispatch"),
    [
        pytest.param(
            form,
            dispatch,
            id=f"{form}-{name}",
            # Each form and each dispatch occurs by default, and the form with all parts in each.
            marks=[] if i in (1, j) else pytest.mark.slow,
        )
        for i, form in enumerate(FORMS[1:])
        for j, (name, dispatch) in enumerate(DISPATCHES.items())
    ],
)
def test_experts_follow_the_formula_on_every_mesh(form, dispatch):
    capacity = Capacity() if dispatch.dropless else Capacity(rule=CapacityRule.NO_DROPS)
    moe = MoEConfig(TopK(k=2), capacity, group_size=L, dispatch=dispatch, experts=form)
    abstract_model = AbstractModel.of(LayerConfig(moe))
    weights = drawn(abstract_model.shapes)
    x = jax.random.normal(jax.random.key(1), (B, L, D))

    y, gradients = apply(abstract_model, weights, x, MeshConfig())
    logits = np.asarray(x) @ np.asarray(weights["router"]["weights"])
    gates = np.asarray(jax.nn.softmax(logits))
    expected = np.zeros(x.shape, np.float32)
    for b, t in np.ndindex(B, L):
        for expert in np.argsort(-gates[b, t])[:2]:
            one = {n: np.asarray(w[expert]) for n, w in weights.items() if n != "router"}
            expected[b, t] += gates[b, t, expert] * by_formula(form, one, np.asarray(x[b, t]))
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)

    sharded = apply(abstract_model, weights, x, MeshConfig(data=2, expert=2, model=2))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), sharded, (y, gradients)
    )


def test_an_expert_of_several_layers_is_a_residual_stack():
    moe = MoEConfig(
        TopK(),
        Capacity(rule=CapacityRule.NO_DROPS),
        group_size=L,
        experts=FORMS[1],
        expert_layers=2,
    )
    abstract_model = AbstractModel.of(LayerConfig(moe))
    weights = drawn(abstract_model.shapes)
    x = jax.random.normal(jax.random.key(1), (B, L, D))
    plain = apply(abstract_model, weights, x, MeshConfig())
    numbers = jax.tree.map(np.asarray, weights)
    gates = np.asarray(jax.nn.softmax(x @ numbers["router"]["weights"]))
    expected = np.zeros(x.shape, np.float32)
    for b, t in np.ndindex(B, L):
        expert = gates[b, t].argmax()
        row = np.asarray(x[b, t])
        for layer in range(2):
            one = {n: w[expert, layer] for n, w in numbers.items() if n != "router"}
            normed = (row - row.mean()) / np.sqrt(row.var() + 1e-5)
            row = row + by_formula(moe.experts, one, normed)
        expected[b, t] = gates[b, t, expert] * row
    np.testing.assert_allclose(plain[0], expected, rtol=1e-4, atol=1e-4)
    sharded = apply(abstract_model, weights, x, MeshConfig(data=2, expert=2, model=2))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), sharded, plain
    )


def test_biases_start_where_they_change_nothing():
    gated = dataclasses.replace(GATED, bias=True, hidden_bias=HiddenBias.MULTIPLICATIVE)
    for form, other in ((GATED, gated), (FORMS[1], dataclasses.replace(FORMS[1], bias=False))):
        x = jax.random.normal(jax.random.key(0), (B, L, D))
        one, two = (FeedForward(D, F, f, 0.0, 1.0, jax.random.key(1)) for f in (form, other))
        np.testing.assert_allclose(one(x, None), two(x, None), rtol=1e-6, atol=1e-6)
