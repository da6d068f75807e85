"""The search, with a compiler that is made up."""

import dataclasses

import pytest
from etils import epath

from configs import quickstart
from moe_jax.errors import UserError
from moe_jax.models.stack import Remat
from moe_jax.parallel.mesh import MeshConfig
from moe_jax.pods import search
from moe_jax.pods.hardware import topology
from tests.pods.reports import MEMORY, TERMS, report

MACHINE = topology("v5e:2x2")


@pytest.fixture
def compiled(monkeypatch):
    """Configs that were compiled. Only what recomputes all fits; more experts' devices are faster."""
    configs = []

    def compile_step(config, topology):
        configs.append(config)
        fits = config.model.remat is Remat.FULL
        seconds = 1 / config.mesh.expert + config.microbatches
        return report(
            fits=fits,
            mesh=dict(data=config.mesh.data, expert=config.mesh.expert, model=config.mesh.model),
            hbm=dataclasses.replace(MEMORY, temporaries=200 if fits else 500),
            roofline=dataclasses.replace(TERMS, step_seconds=seconds) if fits else None,
        )

    monkeypatch.setattr(search, "compile_step", compile_step)
    monkeypatch.setattr(search, "compiler_version", lambda platform: "libtpu 1.2")
    return configs


def found(cache, limit, config=None, only=None):
    seen = []
    config = config or quickstart.get_config()
    ranked = search.search(
        config, MACHINE, "mine", epath.Path(cache), limit, lambda *one: seen.append(one), only
    )
    return ranked, seen


def test_meshes_are_all_that_the_config_allows_and_its_own_comes_first():
    config = quickstart.get_config()
    config.model.num_heads, config.model.num_experts = 2, 6
    config.mesh = MeshConfig(data=2, model=2)
    # 4 does not divide 6 experts or 2 heads.
    assert [(m.data, m.expert, m.model) for m in search.meshes(config, MACHINE)] == [
        (2, 1, 2), (2, 2, 1), (4, 1, 1), (1, 2, 2)
    ]  # fmt: skip


def test_data_goes_over_slices():
    meshes = search.meshes(quickstart.get_config(), topology("2*v5e:2x2"))
    assert meshes and all(mesh.data % 2 == 0 for mesh in meshes)


def test_meshes_that_do_not_divide_the_experts_width_are_left_out():
    config = quickstart.get_config()
    config.model.width = 6 * config.model.num_heads
    # Experts' width is split over `data`, which 4 does not divide.
    sizes = {mesh.data for mesh in search.meshes(config, MACHINE)}
    assert sizes == {1, 2}


def test_the_ladder_goes_down_in_memory_to_a_row_for_each_device():
    config = quickstart.get_config()
    config.data.batch_size, config.model.moe.group_size = 60, config.data.sequence_length
    layouts = search.ladder(config, MeshConfig(data=4))
    # 15 rows for each device: parts of 1, 3, 5 and 15.
    assert [tuple(layout.changes.values()) for layout in layouts] == [
        ("none", 1), ("dots", 1), ("full", 1), ("full", 3), ("full", 5), ("full", 15)
    ]  # fmt: skip


def test_the_best_that_fits_is_first(compiled, tmp_path):
    ranked, seen = found(tmp_path, limit=100)
    assert ranked[0].fits and ranked[0].mesh == {"data": 1, "expert": 4, "model": 1}
    assert ranked[0].config == "mine"
    assert ranked[0].changes == {"model.remat": "full", "microbatches": 1}
    assert [one.fits for one in ranked] == sorted((one.fits for one in ranked), reverse=True)
    assert len(seen) == len(compiled) == len(ranked)
    # What computes in more parts than is necessary is slower, and is not tried.
    assert {config.microbatches for config in compiled} == {1}


def test_a_mesh_begins_where_the_one_before_fitted(compiled, tmp_path):
    found(tmp_path, limit=100)
    tried = [(str(config.mesh), config.model.remat) for config in compiled]
    first, second, *_ = dict.fromkeys(mesh for mesh, _ in tried)
    assert [remat for mesh, remat in tried if mesh == first] == ["none", "dots", "full"]
    # One step up to see whether what recomputes less fits there.
    assert [remat for mesh, remat in tried if mesh == second] == ["full", "dots"]


def test_results_are_kept_and_a_limit_is_no_end(compiled, tmp_path):
    first, _ = found(tmp_path, limit=2)
    assert len(first) == len(compiled) == 2
    again, seen = found(tmp_path, limit=1)
    assert len(compiled) == 3 and len(again) == 3
    assert [just_now for _, just_now in seen] == [False, False, True]


def test_only_a_mesh(compiled, tmp_path):
    ranked, _ = found(tmp_path, limit=100, only=MeshConfig(data=4))
    assert {tuple(one.mesh.values()) for one in ranked} == {(4, 1, 1)}


def test_a_machine_that_nothing_divides_is_an_error(tmp_path):
    config = quickstart.get_config()
    config.data.batch_size, config.model.num_heads, config.model.num_experts = 3, 1, 3
    with pytest.raises(UserError, match="no mesh of the 4 devices of tpu-v5e-4"):
        found(tmp_path, limit=9, config=config)
