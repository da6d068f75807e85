import os
import subprocess
import sys

import pytest

from moe_jax import huge_pages
from tests.scripts import ROOT

CODE = """
import os, sys
from moe_jax import huge_pages
print(os.getpid(), flush=True)
huge_pages.restart_with_them()
print(os.environ["GLIBC_TUNABLES"], sys.argv[1:], os.environ["KEPT"])
"""


@pytest.mark.parametrize(
    ("given", "tunables", "starts"),
    [
        ({}, "glibc.malloc.hugetlb=1", 2),
        (
            {"GLIBC_TUNABLES": "glibc.malloc.check=0"},
            "glibc.malloc.check=0:glibc.malloc.hugetlb=1",
            2,
        ),
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, "glibc.malloc.hugetlb=0", 1),
    ],
)
def test_a_process_starts_again_once_with_what_it_lacks(given, tunables, starts):
    """With its arguments and variables, as the same process; what the user chose stays."""
    environment = {k: v for k, v in os.environ.items() if k != huge_pages.TUNABLES}
    environment |= given | {"KEPT": "yes", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", CODE, "--a flag", "b"],
        env=environment,
        capture_output=True,
        text=True,
    )
    *numbers, last = done.stdout.splitlines()
    assert last == f"{tunables} ['--a flag', 'b'] yes", done.stderr
    assert len(numbers) == starts and len(set(numbers)) == 1


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.delenv(huge_pages.TUNABLES, raising=False)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert huge_pages.environment() == {}
