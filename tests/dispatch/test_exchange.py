import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from moe_jax.dispatch import exchange
from moe_jax.parallel.mesh import EXPERT, MeshConfig, make_mesh

X, G, E, C, D = 4, 2, 8, 3, 5


def over_experts(function, out_specs):
    return jax.shard_map(
        function,
        mesh=make_mesh(MeshConfig(expert=X)),
        in_specs=PartitionSpec(EXPERT),
        out_specs=out_specs,
    )


def buffers():
    return jnp.arange(X * G * E * C * D, dtype=jnp.float32).reshape(X * G, E, C, D)


def test_each_owner_gets_its_experts_rows_of_all_groups():
    sent = over_experts(
        functools.partial(exchange.to_expert_owners, axis=EXPERT), PartitionSpec(EXPERT)
    )(buffers())
    assert sent.shape == (E, X * G * C, D)
    for expert in range(E):
        # Rows stay in the order of (group, slot).
        np.testing.assert_array_equal(sent[expert], buffers()[:, expert].reshape(-1, D))


def test_there_and_back():
    def round_trip(local):
        rows = exchange.to_expert_owners(local, EXPERT)
        return exchange.from_expert_owners(rows, EXPERT, G, C)

    returned = over_experts(round_trip, PartitionSpec(EXPERT))(buffers())
    np.testing.assert_array_equal(returned, buffers())
