"""Claims of papers, each brought to a verdict by training runs: one command, resumable.

    python experiments/reproduce.py [--claim=more_experts --claim=capacity] [--profile=cpu|gpu]
        [--workdir=DIR] [--list]

A claim is a file in experiments/claims/. All runs go through the function that train.py calls, each
in a process of its own; finished ones are kept by their configs in WORKDIR/runs and never repeated,
and a run that fails is named while the others go on. WORKDIR/report gets report.html, report.md, and
a JSON file and a picture of each claim.
"""

import importlib
import json
import os
import pathlib
import sys
from collections.abc import Mapping

from absl import flags

from moe_jax import command_line
from moe_jax.errors import UserError
from moe_jax.reproduction import report, suite
from moe_jax.reproduction.claim import Claim, Profile
from moe_jax.reproduction.suite import SidePlan
from moe_jax.training import provenance

_ROOT = pathlib.Path(__file__).parents[1]
sys.path.append(str(_ROOT))
NAMES = sorted(p.stem for p in (_ROOT / "experiments/claims").glob("[!_]*.py"))

_CLAIM = flags.DEFINE_multi_enum("claim", NAMES, NAMES, "May be repeated; default: all.")
_PROFILE = flags.DEFINE_enum_class("profile", Profile.CPU, Profile, "What runs are sized for.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/reproduce", "Folder of runs and report.")
_LIST = flags.DEFINE_bool("list", False, "Print the claims and how many runs are left, and stop.")


def load(name: str) -> Claim:
    """The claim of a file in experiments/claims/."""
    return importlib.import_module(f"experiments.claims.{name}").CLAIM


CLAIMS = {name: load(name) for name in NAMES}  # Their flags must be known before flags are read.


def main() -> None:
    """Runs what is missing, then reports what is finished."""
    profile, workdir = _PROFILE.value, pathlib.Path(_WORKDIR.value)
    claims = [CLAIMS[name] for name in dict.fromkeys(_CLAIM.value)]
    plans = {claim.name: suite.plans_of(claim, profile, workdir) for claim in claims}
    if _LIST.value:
        for claim in claims:
            left = len(set[object]().union(*(plan.runs_left() for plan in plans[claim.name])))
            print(f"{claim.name:20} {left:3} runs left  {claim.title}")
        return
    (workdir / "runs").mkdir(parents=True, exist_ok=True)  # Said here, and not by each process.
    # A GPU is one machine for one run; of a CPU each run has a core.
    processes = (os.cpu_count() or 1) if profile == Profile.CPU else 1
    every_plan = [plan for its in plans.values() for plan in its]
    failed = suite.run_all(every_plan, processes)
    output = workdir / "report"
    unreported = {}
    for claim in claims:
        results = suite.results_of(claim, profile, workdir)
        if results is None:
            unreported[claim.name] = "runs failed"
            continue
        conditions = _conditions(plans[claim.name], profile, processes)
        try:
            report.write_claim(claim, results, conditions, output)
        except UserError as error:  # Of one claim; the others are reported all the same.
            unreported[claim.name] = str(error)
    print(report.verdict_table(report.write_reports(output)))
    print(f"report.html, report.md and pictures are in {output}, runs in {workdir / 'runs'}")
    if failed or unreported:
        raise UserError(_complaint(failed, unreported, workdir))


def _complaint(
    failed: Mapping[pathlib.Path, str], unreported: Mapping[str, str], workdir: pathlib.Path
) -> str:
    """What failed and which claims have no verdict, in a sentence."""
    runs = f"{len(failed)} runs failed ({'; '.join(failed.values())}), see " if failed else "see "
    claims = "; ".join(f"{name} ({reason})" for name, reason in unreported.items())
    return (
        f"{runs}{workdir}/runs/*/log.txt; without a verdict are {claims or 'none'}; the same command "
        "tries again."
    )


def _conditions(plans: list[SidePlan], profile: Profile, processes: int) -> report.Conditions:
    """Of the runs of a claim, as their folders say."""
    found = [
        run.provenance()
        for plan in plans
        for run in plan.runs(plan.learning_rate() or plan.side.learning_rates[0])
    ]
    commits = {str(record["commit"]) for record in found} or {str(provenance.commit())}
    datasets = {json.dumps(record["dataset"]) for record in found}
    named = [(d["name"], d["sha256"]) for d in map(json.loads, sorted(datasets))]
    return report.Conditions(
        profile,
        provenance.machine(),
        processes,
        sorted(commits),
        str(provenance.commit()),
        [f"{name} (sha256 {sha256[:12]})" for name, sha256 in named],
    )


if __name__ == "__main__":
    command_line.run(main)
