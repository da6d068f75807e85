"""The committed reports of the giants: budgets of `make test-pods`, and the numbers of docs/pods.md."""

import pathlib
import re

import pytest

from experiments import pod_tables
from moe_jax.pods import budgets
from moe_jax.training.rows import pods_of

ROOT = pathlib.Path(__file__).parents[2]


def locked_compiler() -> str:
    """The libtpu that `make install EXTRA=tpu` installs on Python 3.11."""
    lock = (ROOT / "requirements.lock").read_text()
    versions = re.findall(r"^libtpu==([\d.]+)(.*)$", lock, re.MULTILINE)
    (version,) = (v for v, marker in versions if "python_full_version >= '3.12'" not in marker)
    return f"libtpu {version}"


@pytest.mark.parametrize("config", budgets.GIANTS)
def test_a_giant_has_a_report_of_its_layout_that_fits(config):
    report = budgets.budget_of(config, locked_compiler())
    assert report is not None, "experiments/pod_tables.py --compile makes it"
    assert budgets.violations(report, report) == []
    layout = pods_of(str(ROOT / config))[0]
    mesh = layout.mesh
    assert report.mesh == {"data": mesh.data, "expert": mesh.expert, "model": mesh.model}
    assert report.changes == dict(layout.changes)
    assert (report.config, report.topology) == (config, layout.topology)
    assert report.note == layout.note and report.exact


def test_the_page_has_the_reports_numbers():
    assert pod_tables.PAGE.read_text() == pod_tables.page(pod_tables.newest_reports())
