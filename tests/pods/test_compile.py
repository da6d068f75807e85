"""What is wrong with a machine or a mesh, before any compiler is asked."""

import pytest

from configs import quickstart
from moe_jax.errors import UserError
from moe_jax.parallel.mesh import MeshConfig
from moe_jax.pods.compile import compile_step, memory_fraction
from moe_jax.pods.hardware import topology

H100 = topology("h100:1x8")


@pytest.mark.parametrize(
    ("variables", "fraction"),
    [
        ({}, 0.75),
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": ".9"}, 0.9),
        ({"XLA_CLIENT_MEM_FRACTION": "1"}, 1.0),
    ],
)
def test_a_gpu_has_what_jax_takes_of_it(monkeypatch, variables, fraction):
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert memory_fraction(H100.chip) == fraction
    assert memory_fraction(topology("v5e:2x2").chip) == 1


@pytest.mark.parametrize("value", ["0", "75", "most"])
def test_a_share_that_is_none_is_refused(monkeypatch, value):
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", value)
    with pytest.raises(UserError) as raised:
        memory_fraction(H100.chip)
    assert str(raised.value) == (
        f"XLA_CLIENT_MEM_FRACTION is {value!r}; it is the share of a GPU's memory that JAX takes, such "
        "as 0.9."
    )


def test_only_data_goes_over_clusters_of_gpus():
    config = quickstart.get_config()
    config.mesh = MeshConfig(data=3, expert=4)
    with pytest.raises(
        UserError, match=r"mesh.data is 3, which the 2 slices or clusters of 2\*gpu-h100-6 do"
    ):
        compile_step(config, topology("2*h100:1x6"))


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
