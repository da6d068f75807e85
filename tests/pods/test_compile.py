"""What is wrong with a machine or a mesh, before any compiler is asked."""

import pytest

from configs import quickstart
from moe_jax.errors import UserError
from moe_jax.parallel.mesh import MeshConfig
from moe_jax.pods.compile import compile_step
from moe_jax.pods.hardware import topology


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (MeshConfig(data=2, expert=4), r"expert=4 x model=1 has 8 devices, but tpu-v5e-4 has 4 \("),
        (MeshConfig(expert=4), r"num_experts is 6, which the 4 devices of mesh axis expert do not"),
        (MeshConfig(model=4), r"num_heads is 2, which the 4 devices of mesh axis model do not"),
    ],
)
def test_a_mesh_that_cannot_be_is_named(mesh, message):
    config = quickstart.get_config()
    config.mesh, config.model.num_experts, config.model.num_heads = mesh, 6, 2
    with pytest.raises(UserError, match=message):
        compile_step(config, topology("v5e:2x2"))
