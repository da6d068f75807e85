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


def test_a_giant_fits_and_costs_what_it_did():
    command = [
        sys.executable, "experiments/compile_pod.py", f"--config={CONFIG}", "--format=json",
        f"--topology={budgets.ON_GPUS[CONFIG]}",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = PodReport.read(json.loads(done.stdout))
    # Another compiler has no budget: then fit and FLOPs are looked at.
    budget = budgets.budget_of(CONFIG, compiler_version("gpu"))
    assert budgets.violations(report, budget) == []
