"""The published giants on their machines, and what their steps were found to cost.

docs/results/pods/<compiler>/, a folder for each version of a compiler, has a report for each. They are
budgets: a change that makes a step larger, or sends something else, is noticed.
"""

import json
import pathlib
from collections.abc import Sequence

from moe_jax.pods.report import GIB, CollectiveSum, PodReport

RESULTS = pathlib.Path(__file__).parents[2] / "docs/results/pods"
TOLERANCE = 0.05

# On TPUs by their first layout, as --config names them, in the order of publication.
GIANTS = (
    "configs/gshard.py:2048e_36l",
    "configs/switch.py:c",
    "configs/switch.py:xxl",
    "configs/vmoe.py:vmoe_15b",
    "configs/glam.py:64b_64e",
    "configs/st_moe.py:32b",
    "configs/soft_moe.py:soft_h14_256e",
    "configs/deepseek_moe.py:145b",
    "configs/mixtral.py:8x7b",
    "configs/mixtral.py:8x22b",
    "configs/deepseek_v3.py:v3",
)
# On GPUs, and their machines.
ON_GPUS = {
    "configs/mixtral.py:8x7b": "h100:16x8",
    "configs/deepseek_moe.py:16b": "h800:32x8",
    "configs/olmoe.py:1b_7b": "h100:8x8",
    "configs/deepseek_v3.py:v3": "h800:256x8",
}


def budget_file(config: str, compiler: str) -> pathlib.Path:
    """Where the report of a config (`configs/glam.py:64b_64e`) by a compiler (`libtpu 0.0.42.1`) is."""
    file, _, row = config.partition(":")
    return RESULTS / compiler.replace(" ", "-") / f"{pathlib.Path(file).stem}_{row}.json"


def budget_of(config: str, compiler: str) -> PodReport | None:
    """The committed report, None where this compiler has none."""
    path = budget_file(config, compiler)
    return PodReport.read(json.loads(path.read_text())) if path.exists() else None


def violations(report: PodReport, budget: PodReport | None) -> list[str]:
    """What is wrong with a step, in a sentence each; empty if nothing is.

    Args:
      report: of the step as it is.
      budget: by the same compiler; without one only fit and FLOPs are looked at.
    """
    found = []
    if not report.fits:
        found.append(f"it does not fit: {report.refusal or report.hbm}.")
    if report.roofline is None:
        return found  # There is no program.
    ratio = report.flops_per_device / report.accounted_flops_per_device
    if abs(ratio - 1) > TOLERANCE:
        found.append(f"it executes {ratio:.3f} of the FLOPs that the accounting has.")
    if budget is None:
        return found
    ratio = report.hbm.total / budget.hbm.total
    if abs(ratio - 1) > TOLERANCE:
        found.append(
            f"it takes {report.hbm.total / GIB:.2f} GiB, {ratio:.3f} of the budget's "
            f"{budget.hbm.total / GIB:.2f}."
        )
    ours, theirs = _lines(report.collectives), _lines(budget.collectives)
    found += [f"it has a collective that the budget lacks: {one}." for one in sorted(ours - theirs)]
    found += [f"it lacks a collective of the budget: {one}." for one in sorted(theirs - ours)]
    return found


def _lines(collectives: Sequence[CollectiveSum]) -> set[str]:
    return {
        f"{one.count} x {one.kind} over {' x '.join(one.axes)}, {one.bytes:,} bytes"
        for one in collectives
    }
