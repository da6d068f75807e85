"""A published giant compiled for its GPUs as a user would. Run by `make test-gpu`."""

import json
import pathlib
import subprocess
import sys

import pytest

from moe_jax.pods import budgets
from moe_jax.pods.compile import compiler_version
from moe_jax.pods.report import PodReport

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1800)]

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = "configs/mixtral.py:8x7b"
BUDGET = budgets.budget_of(CONFIG, compiler_version("gpu"))


# Another compiler has no budget, and the step above shows that it compiles.
@pytest.mark.parametrize("budget", [BUDGET] if BUDGET else [], ids=[CONFIG] if BUDGET else [])
def test_a_giant_fits_and_costs_what_it_did(budget):
    command = [
        sys.executable, "experiments/compile_pod.py", f"--config={CONFIG}", "--format=json",
        f"--topology={budgets.ON_GPUS[CONFIG]}",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = PodReport.read(json.loads(done.stdout))
    assert budgets.violations(report, budget) == []
