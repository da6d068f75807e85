"""A claim of tiny runs with a planted effect: a model that learns has a lower loss than one that cannot.

python tests/reproduction/planted.py DATA_DIR WORKDIR [broken]
"""

import dataclasses
import pathlib
import sys

from matplotlib.figure import Figure

from moe_jax.reproduction import report, suite
from moe_jax.reproduction.claim import Claim, Profile, ResultTable, Side
from moe_jax.reproduction.results import Results
from moe_jax.reproduction.verdicts import Finding, compare
from moe_jax.training.experiment import Experiment
from tests.tiny import tiny_config

FILE = "tests/reproduction/planted.py"


def get_config() -> Experiment:
    """The smallest run, on one device; without a MoE it compiles faster."""
    config = tiny_config("")
    config.model.num_layers, config.model.moe_every = 1, 0
    config.steps, config.checkpoint.every, config.evaluation.every = 16, 4, 0
    config.mesh.data = config.mesh.expert = 1
    return config


def planted(data_dir: str) -> Claim:
    """Learning lowers the loss; the opposite; and other seeds, which change nothing."""

    def sides(profile: Profile) -> list[Side]:
        data = {"data.data_dir": data_dir}
        learns = Side("learns", FILE, data, (1e-4, 1e-2), seeds=(0, 1))
        again = Side("learns with other seeds", FILE, data, (1e-2,), seeds=(2, 3))
        cannot = Side("cannot learn", FILE, data, (1e-9,), seeds=(0, 1))
        return [learns, again, cannot]

    def findings(results: Results) -> list[Finding]:
        learns, again, cannot = (
            results[name].test_losses
            for name in ("learns", "learns with other seeds", "cannot learn")
        )
        return [
            compare("planted", "", larger=cannot, smaller=learns),
            compare("reversed", "", larger=learns, smaller=cannot),
            compare("null", "", larger=learns, smaller=again),
        ]

    def table(results: Results) -> ResultTable:
        return ResultTable(
            ["", "ours"], [[name, str(results[name].test_losses)] for name in results.sides]
        )

    def draw(results: Results, figure: Figure) -> None:
        axes = figure.subplots()
        for name, side in results.sides.items():
            axes.plot(*side.runs[0].series("train/loss"), label=name)

    return Claim("planted", "Learning lowers the loss", "Of course.", sides, findings, table, draw)


def broken(own: Claim) -> Claim:
    """The same claim with one side, whose dataset is unknown."""
    unknown = Side("unknown data", FILE, {"data.dataset": "unknown"}, (1e-2,), seeds=(0,))
    return dataclasses.replace(own, name="broken", sides=lambda profile: [unknown])


def main() -> None:
    """As experiments/reproduce.py, for these claims; prints the labels of failed runs."""
    data_dir, workdir = sys.argv[1], pathlib.Path(sys.argv[2])
    own = planted(data_dir)
    claims = [broken(own), own]
    plans = [plan for claim in claims for plan in suite.plans_of(claim, Profile.CPU, workdir)]
    print(*suite.run_all(plans, processes=2).values(), sep="\n")
    conditions = report.Conditions(
        "cpu", "a machine", 2, ["0123"], "4567+changes", ["python_library"]
    )
    for claim in claims:
        results = suite.results_of(claim, Profile.CPU, workdir)
        if results is not None:
            report.write_claim(claim, results, conditions, workdir / "report")
    report.write_reports(workdir / "report")


if __name__ == "__main__":
    main()
