"""Routers, losses and activations inside a shard_map, where JAX keeps over which mesh axes each array
varies: a derivative that JAX writes with constants is refused there, by some versions only.

Axis letters: G groups (one per device), S tokens per group, E experts, d width.
"""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from moe_jax.layers.feed_forward import Activation
from moe_jax.parallel.mesh import TOKEN_AXES, MeshConfig, make_mesh
from moe_jax.routing import losses, noisy_top_k
from moe_jax.routing.catalogue import ENTRIES
from moe_jax.routing.router import ExpertAssignment, Mean, RouterInputs
from tests.routing.test_losses import LOSSES

G, S, D, E, V = 8, 64, 4, 8, 264
MESH = make_mesh(MeshConfig(2, 4, 1))
TOKENS = PartitionSpec(TOKEN_AXES)


def runs(function, groups):
    """Outside and inside a shard_map: a function of one group, its values and gradients.

    Args:
      function: (parameters, arrays of one group) -> pytree.
      groups: pytree of arrays with a leading axis G.

    Returns:
      Two compiled functions of the parameters, which are the same for all groups, as a router's
      are. Each returns, as numpy arrays, what `function` does with a leading axis G, and the
      gradients by the parameters and by the groups' floats of a sum of all floats in it with fixed
      random weights. Outside, all groups are computed under one vmap; inside, each on a device of
      its own without.
    """
    floats, rest = split(groups)

    def of_device(parameters, group):
        values = function(parameters, jax.tree.map(lambda leaf: leaf[0], group))
        return jax.tree.map(lambda leaf: leaf[None], values)

    outside = jax.vmap(function, in_axes=(None, 0))
    inside = jax.shard_map(
        of_device, mesh=MESH, in_specs=(PartitionSpec(), TOKENS), out_specs=TOKENS
    )

    def compiled(lifted):
        def total(parameters, floats):
            values = lifted(parameters, joined(floats, rest))
            return weighted_sum(values), values

        run = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))

        def evaluated(parameters):
            (_, values), gradients = run(parameters, floats)
            return jax.device_get((values, gradients))

        return evaluated

    return compiled(outside), compiled(inside)


def split(tree):
    """The floating-point leaves as a list, and what `joined` needs to put them back."""
    leaves, structure = jax.tree.flatten(tree)
    is_float = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]
    others = [None if real else leaf for real, leaf in zip(is_float, leaves, strict=True)]
    return [leaf for real, leaf in zip(is_float, leaves, strict=True) if real], (structure, others)


def joined(floats, rest):
    structure, others = rest
    floats = iter(floats)
    return structure.unflatten([next(floats) if leaf is None else leaf for leaf in others])


def weighted_sum(values):
    generator = np.random.default_rng(0)
    return sum(jnp.sum(leaf * generator.normal(size=leaf.shape)) for leaf in split(values)[0])


def assert_alike(outside, inside):
    """To 1e-6 of each array's largest entry; integers exactly."""
    assert jax.tree.structure(outside) == jax.tree.structure(inside)
    for (path, want), got in zip(
        jax.tree.leaves_with_path(outside), jax.tree.leaves(inside), strict=True
    ):
        tolerance = 1e-6 * max(1.0, np.abs(want).max()) if want.dtype.kind == "f" else 0
        np.testing.assert_allclose(
            got, want, rtol=0, atol=tolerance, err_msg=jax.tree_util.keystr(path)
        )


def in_order_of_tokens(assignment):
    """An expert's tokens by number: of two that it wants alike, rounding decides which is first."""
    if not isinstance(assignment, ExpertAssignment):
        return assignment
    order = jnp.argsort(assignment.tokens, axis=1)
    taken = (assignment.tokens, assignment.gates)
    return ExpertAssignment(*(jnp.take_along_axis(array, order, axis=1) for array in taken))


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_every_router_of_the_catalogue(entry):
    router = entry.router
    shapes = {**router.init(jax.random.key(0), D, E), **router.init_state(E)}
    parameters = {
        name: 0.5 * jax.random.normal(jax.random.key(i), shapes[name].shape)
        for i, name in enumerate(sorted(shapes))
    }
    position = np.arange(G * S).reshape(G, S)
    groups = {
        "x": jax.random.normal(jax.random.key(7), (G, S, D)),
        "mask": jnp.asarray(position % 11 != 5),
        "ids": jnp.asarray(position * 7 % V, jnp.int32),
        "group": jnp.arange(G),
    }

    def route(parameters, group):
        inputs = RouterInputs(
            group["x"],
            group["mask"],
            token_ids=group["ids"],
            positions=jnp.arange(S, dtype=jnp.int32),
            sequence_ids=jnp.arange(S, dtype=jnp.int32) // 5,
            key=jax.random.fold_in(jax.random.key(3), group["group"]),
            shared_key=jax.random.key(4),
            train=True,
        )
        routing = router.route(parameters, inputs, E, capacity=4)
        return dataclasses.replace(routing, assignment=in_order_of_tokens(routing.assignment))

    outside, inside = runs(route, groups)
    want = outside(parameters)
    assert_alike(want, inside(parameters))
    gradients = want[1][0]
    if "weights" in gradients:
        assert np.abs(gradients["weights"]).max() > 0
    # All parameters 0: every expert is equally probable.
    _, at_balance = inside(jax.tree.map(jnp.zeros_like, parameters))
    assert all(np.isfinite(gradient).all() for gradient in jax.tree.leaves(at_balance))


def test_every_loss():
    public = {
        name
        for name, function in inspect.getmembers(losses, inspect.isfunction)
        if function.__annotations__["return"] is Mean and not name.startswith("_")
    }
    assert public == set(LOSSES)

    logits = jax.random.normal(jax.random.key(0), (G, S, E))
    groups = {
        "p": jax.nn.softmax(logits),
        "logits": logits,
        "threshold": jnp.sort(logits)[..., -2:-1],
        "experts": jnp.argsort(-logits)[..., :2],
        "mask": jax.random.bernoulli(jax.random.key(1), 0.9, (G, S)),
        "sequence_ids": jnp.broadcast_to(jnp.arange(S) // 5, (G, S)),
    }

    def all_losses(parameters, group):
        by_group = group["logits"].reshape(S, 2, E // 2)
        noisy = by_group + 0.1 * group["threshold"][..., None]
        deviation = jax.nn.softplus(by_group)
        return {
            **{name: loss(group) for name, loss in LOSSES.items()},
            "chance_kept": noisy_top_k.chance_kept(by_group, noisy, deviation, 2),
        }

    outside, inside = (run({}) for run in runs(all_losses, groups))
    assert_alike(outside, inside)
    assert set(outside[0]) == {*LOSSES, "chance_kept"}


def test_every_activation():
    x = 3 * jax.random.normal(jax.random.key(0), (G, S, D))

    def activated(parameters, x):
        return {str(activation): activation(x) for activation in Activation}

    outside, inside = (run({}) for run in runs(activated, x))
    assert_alike(outside, inside)
