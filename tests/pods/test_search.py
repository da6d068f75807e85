"""The search, with a compiler that is made up."""

import dataclasses

import pytest
from etils import epath

from configs import quickstart
from moe_jax.errors import UserError
from moe_jax.models.stack import Remat
from moe_jax.pods import search
from moe_jax.pods.hardware import topology
from tests.pods.reports import MEMORY, TERMS, report

MACHINE = topology("v5e:2x2")


@pytest.fixture
def compiled(monkeypatch):
    """Configs that were compiled. Only what recomputes all fits; more experts' devices are faster."""
    configs = []

    def compile_step(config, topology, *, name, changes):
        configs.append(config)
        fits = config.model.remat is Remat.FULL
        seconds = 1 / config.mesh.expert + config.microbatches
        return report(
            config=name,
            changes=changes,
            fits=fits,
            mesh=dict(data=config.mesh.data, expert=config.mesh.expert, model=config.mesh.model),
            hbm=dataclasses.replace(MEMORY, temporaries=200 if fits else 500),
            roofline=dataclasses.replace(TERMS, step_seconds=seconds) if fits else None,
        )

    monkeypatch.setattr(search, "compile_step", compile_step)
    return configs


def found(cache, limit):
    seen = []
    config = quickstart.get_config()
    ranked = search.search(config, MACHINE, "mine", epath.Path(cache), limit, seen.append)
    return ranked, seen


def test_meshes_are_all_that_the_config_allows_and_likely_ones_come_first():
    config = quickstart.get_config()
    config.model.num_heads, config.model.num_experts = 2, 6
    meshes = search.meshes(config, 4)
    # 4 does not divide 6 experts or 2 heads.
    assert [(m.data, m.expert, m.model) for m in meshes] == [
        (2, 2, 1), (4, 1, 1), (1, 2, 2), (2, 1, 2)
    ]  # fmt: skip


def test_the_best_that_fits_is_first(compiled, tmp_path):
    ranked, seen = found(tmp_path, limit=100)
    assert ranked[0].fits and ranked[0].mesh == {"data": 1, "expert": 4, "model": 1}
    assert ranked[0].changes == {"model.remat": "full", "microbatches": 1}
    assert [one.fits for one in ranked] == sorted((one.fits for one in ranked), reverse=True)
    assert len(seen) == len(compiled) == len(ranked)
    # A mesh is left as soon as a layout fits: nothing is computed in more microbatches.
    assert {config.microbatches for config in compiled} == {1}


def test_results_are_kept_and_a_limit_is_no_end(compiled, tmp_path):
    first, _ = found(tmp_path, limit=2)
    assert len(first) == len(compiled) == 2
    again, seen = found(tmp_path, limit=1)
    assert len(compiled) == 3 and len(again) == len(seen) == 3


def test_a_machine_that_nothing_divides_is_an_error(tmp_path):
    config = quickstart.get_config()
    config.data.batch_size, config.model.num_heads, config.model.num_experts = 3, 1, 3
    with pytest.raises(UserError, match="no mesh of the 4 devices of tpu-v5e-4"):
        search.search(config, MACHINE, "mine", epath.Path(tmp_path), 9, lambda report: None)
