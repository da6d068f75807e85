"""Published giants, compiled for their machines as a user would. Run by `make test-pods`."""

import json
import pathlib
import subprocess
import sys

import pytest

from moe_jax.pods import budgets
from moe_jax.pods.compile import compiler_version
from moe_jax.pods.report import PodReport

pytestmark = [pytest.mark.pods, pytest.mark.timeout(1800)]

ROOT = pathlib.Path(__file__).parents[2]
# Those that compile fastest, in 3 to 5 minutes of a core; the others take up to 15.
FAST = (
    "configs/glam.py:64b_64e",
    "configs/mixtral.py:8x22b",
    "configs/soft_moe.py:soft_h14_256e",
    "configs/vmoe.py:vmoe_15b",
)


@pytest.mark.parametrize("config", FAST)
def test_a_giant_fits_and_costs_what_it_did(config):
    command = [sys.executable, "experiments/compile_pod.py", f"--config={config}", "--format=json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = PodReport.read(json.loads(done.stdout))
    # Another compiler has no budget: then fit and FLOPs are looked at.
    budget = budgets.budget_of(config, compiler_version("tpu"))
    assert budgets.violations(report, budget) == []
