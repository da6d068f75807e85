"""Puts a report of experiments/reproduce.py into docs/results/claims, and its verdicts into the README.

python experiments/publish_claims.py [--report=runs/reproduce/report]
"""

import pathlib

from absl import flags

from moe_jax import command_line
from moe_jax.reproduction.publication import publish

_REPORT = flags.DEFINE_string("report", "runs/reproduce/report", "Folder of the report.")


def main() -> None:
    """Copies, and says where to."""
    root = pathlib.Path(__file__).parents[1]
    print(
        f"the report is in {publish(pathlib.Path(_REPORT.value), root)}, its verdicts in README.md"
    )


if __name__ == "__main__":
    command_line.run(main)
