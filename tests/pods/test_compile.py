"""What is wrong with a machine or a mesh, before any compiler is asked; and GPUs that are not here."""

import pytest

from configs import quickstart
from moe_jax.errors import UserError
from moe_jax.parallel.mesh import MeshConfig
from moe_jax.pods.compile import compile_step
from moe_jax.pods.hardware import topology
from tests.tiny import tiny_config


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


def test_gpus_that_are_not_here_are_compiled_for_as_cpus(caplog):
    report = compile_step(tiny_config(data_dir=""), topology("gpu-h100-8"))
    assert (report.compiled_for, report.devices, report.fits) == ("cpu", 8, True)
    assert "not 8 GPUs here" in caplog.text
    assert {one.kind for one in report.collectives} >= {"all-to-all", "all-reduce"}
    assert report.hbm.temporaries > 0
