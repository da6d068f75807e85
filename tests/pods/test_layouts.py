import pytest

from configs import quickstart
from moe_jax.errors import UserError
from moe_jax.models.stack import Remat
from moe_jax.parallel.mesh import MeshConfig
from moe_jax.pods.layouts import changes_between, laid_out
from moe_jax.training.rows import PodLayout

LAYOUTS = (
    PodLayout("v5e:2x2", MeshConfig(data=2, expert=2), {"model.remat": "full"}, note="why"),
    PodLayout("v4:2x2x2", MeshConfig(expert=4, model=2)),
)


def test_a_layout_is_found_by_either_name_of_its_machine():
    config = quickstart.get_config()
    for name in ("v5e:2x2", "tpu-v5e-4"):
        laid, note = laid_out(config, LAYOUTS, name)
        assert (str(laid.mesh), note) == ("data=2 x expert=2 x model=1", "why")
        assert laid.model.remat is Remat.FULL
    assert config.model.remat is Remat.NONE, "the user's config was changed"
    laid, note = laid_out(config, LAYOUTS, "tpu-v4-16")
    assert (str(laid.mesh), laid.model.remat, note) == (
        "data=1 x expert=4 x model=2", Remat.NONE, ""
    )  # fmt: skip


def test_a_mesh_on_the_command_line_goes_before_the_layouts():
    laid, _ = laid_out(quickstart.get_config(), LAYOUTS, "v5e:2x2", "data:4")
    assert str(laid.mesh) == "data=4 x expert=1 x model=1"
    assert laid.model.remat is Remat.FULL
    laid, note = laid_out(quickstart.get_config(), LAYOUTS, "v5e:4x4", "data:16")
    assert (laid.mesh.size, laid.model.remat, note) == (16, Remat.NONE, "")


def test_a_machine_without_layout_needs_a_mesh():
    with pytest.raises(
        UserError, match=r"--topology is v5e:4x4, .* name one that it has, v5e:2x2, v4:2x2x2, or"
    ):
        laid_out(quickstart.get_config(), LAYOUTS, "v5e:4x4")
    with pytest.raises(UserError, match="nor for another; give --mesh"):
        laid_out(quickstart.get_config(), (), "v5e:4x4")


def test_changes_are_of_fields_that_exist():
    with pytest.raises(UserError, match=r"a change of model.rematerialize names no field"):
        PodLayout("v5e:2x2", MeshConfig(), {"model.rematerialize": "full"}).apply(
            quickstart.get_config()
        )


def test_changes_between_configs_leave_the_mesh_out():
    config = quickstart.get_config()
    laid, _ = laid_out(config, LAYOUTS, "v5e:2x2")
    assert changes_between(config, laid) == {"model.remat": "full"}
