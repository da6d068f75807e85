"""The committed reports of the giants: budgets of `make test-pods`, and the numbers of docs/pods.md."""

import pathlib
import re

import pytest

from experiments import pod_tables
from moe_jax.pods import budgets
from moe_jax.training.rows import pods_of

ROOT = pathlib.Path(__file__).parents[2]


def locked(compiler: str) -> str:
    """What is installed on Python 3.11, such as libtpu 0.0.42.1."""
    lock = (ROOT / "requirements.lock").read_text()
    versions = re.findall(rf"^{compiler}==([\d.]+)(.*)$", lock, re.MULTILINE)
    (version,) = (v for v, marker in versions if "python_full_version >= '3.12'" not in marker)
    return f"{compiler} {version}"


def is_of(report, config, layout):
    mesh = layout.mesh
    assert report.mesh == {"data": mesh.data, "expert": mesh.expert, "model": mesh.model}
    assert report.changes == dict(layout.changes)
    assert (report.config, report.topology) == (config, layout.topology)
    assert report.note == layout.note and report.exact


@pytest.mark.parametrize("config", budgets.GIANTS)
def test_a_giant_has_a_report_of_its_layout_that_fits(config):
    report = budgets.budget_of(config, locked("libtpu"))
    assert report is not None, "experiments/pod_tables.py --compile makes it"
    assert budgets.violations(report, report) == []
    is_of(report, config, pods_of(str(ROOT / config))[0])


# With room for all rows that can come to a device, as its authors drop none.
TOO_LARGE = {"configs/olmoe.py:1b_7b"}


@pytest.mark.parametrize(("config", "machine"), budgets.ON_GPUS.items())
def test_a_giant_has_a_report_of_its_layout_on_gpus(config, machine):
    report = budgets.budget_of(config, locked("jax-cuda12-pjrt"))
    assert report is not None, "experiments/pod_tables.py --compile --gpus makes it"
    wrong = budgets.violations(report, report)
    assert len(wrong) == (config in TOO_LARGE) and report.fits == (config not in TOO_LARGE), wrong
    assert (report.compiled_for, report.memory_fraction) == ("gpu", 0.75)
    (layout,) = (one for one in pods_of(str(ROOT / config)) if one.topology == machine)
    is_of(report, config, layout)


def test_the_page_has_the_reports_numbers():
    assert pod_tables.PAGE.read_text() == pod_tables.page(*pod_tables.newest_reports())
