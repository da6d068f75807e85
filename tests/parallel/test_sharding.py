import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from moe_jax.errors import UserError
from moe_jax.parallel.mesh import MeshConfig, make_mesh
from moe_jax.parallel.sharding import (
    axis_size,
    constrain,
    parameter_shardings,
    parameter_spec,
    partition_spec,
)

EXPERT_AXES = ("experts", "expert_embed", "mlp")


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=2, expert=2, model=2))


def test_partition_spec():
    assert partition_spec(EXPERT_AXES) == PartitionSpec("expert", ("data",), "model")
    assert partition_spec(("batch", "length")) == PartitionSpec(("data", "expert"), None)


def test_an_unknown_name_is_an_error():
    with pytest.raises(UserError, match=r"dimension name 'embd' is not in.*use one of embed"):
        partition_spec(("embd", "mlp"))


@pytest.mark.parametrize(("size", "position"), [(6, 0), (9, 1), (7, 2)])
def test_an_indivisible_dimension_is_an_error(mesh, size, position):
    shape = [8, 8, 8]
    shape[position] = size
    if size % 2 == 0:
        mesh = make_mesh(MeshConfig(expert=4))
    name = EXPERT_AXES[position]
    with pytest.raises(UserError, match=f"parameter w has {size} along its '{name}' dimension"):
        parameter_spec("w", shape, EXPERT_AXES, mesh, fsdp_min_size=0)


def test_small_parameters_are_not_split_to_save_memory(mesh):
    def spec(fsdp_min_size, axes=("embed", "mlp"), shape=(16, 8)):
        return parameter_spec("w", shape, axes, mesh, fsdp_min_size)

    assert spec(128) == PartitionSpec(("data", "expert"), "model")
    assert spec(129) == PartitionSpec(None, "model")
    # The stacking axis does not make a parameter large: each layer is gathered by itself.
    assert spec(129, ("layers", "embed", "mlp"), (10, 16, 8)) == PartitionSpec(None, None, "model")
    # 14 rows are divided by one of the axes, 15 by none.
    assert spec(0, shape=(14, 8)) == PartitionSpec(("data",), "model")
    assert spec(0, shape=(15, 8)) == PartitionSpec(None, "model")
    # A mesh axis splits one dimension only: the first that saves memory.
    assert spec(0, ("embed", "latent"), (16, 8)) == PartitionSpec(("data", "expert"), None)
    assert spec(0, ("embed", "latent"), (15, 8)) == PartitionSpec(None, ("data", "expert"))
    # A small parameter need not be divisible.
    assert spec(129, shape=(15, 8)) == PartitionSpec(None, "model")
    # Experts are always split, as the MoE layer expects.
    assert spec(10**9, EXPERT_AXES, (8, 4, 4)) == PartitionSpec("expert", "data", "model")


def test_axis_size(mesh):
    assert axis_size(mesh, None) == 1
    assert axis_size(mesh, "model") == 2
    assert axis_size(mesh, ("data", "expert")) == 4


def test_parameter_shardings_name_the_parameter(mesh):
    shapes = {"layer": {"good": jnp.zeros((4, 8)), "bad": jnp.zeros((4, 7))}}
    axes = {"layer": {"good": ("router", "mlp"), "bad": ("router", "mlp")}}
    with pytest.raises(UserError, match="parameter layer/bad has 7"):
        parameter_shardings(shapes, axes, mesh, fsdp_min_size=0)
    good = parameter_shardings(shapes["layer"]["good"], axes["layer"]["good"], mesh, 0)
    assert good.spec == PartitionSpec(None, "model")


def test_constrain(mesh):
    x = jnp.zeros((4, 4, 4))
    assert constrain(x, "batch", "length", "mlp") is x
    with jax.set_mesh(mesh):
        laid_out = jax.jit(lambda x: constrain(x, "batch", "length", "mlp"))(x)
    assert laid_out.sharding.spec == PartitionSpec(("data", "expert"), None, "model")
