"""Held-out loss of a run, in total and per domain.

    python experiments/evaluate.py --workdir=runs/quickstart/moe [--split=test] [--format=json]

Uses the newest good checkpoint; --mesh=data:1,expert:2 evaluates on another mesh than the run's.
"""

import json
import math

import jax
from absl import flags

from moe_jax import command_line
from moe_jax.data.pipelines import TextPipeline
from moe_jax.training.loop import Evaluator
from moe_jax.training.trained import Trained

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
_SPLIT = flags.DEFINE_enum("split", "validation", ["validation", "test"], "Held-out split.")
_BATCHES = flags.DEFINE_integer("batches", None, "Batches; default: the config's.", lower_bound=1)
_MESH = flags.DEFINE_string("mesh", "", "Such as data:2,expert:4; default: the run's.")
_FORMAT = flags.DEFINE_enum("format", "table", ["table", "json"], "What stdout gets.")


def main() -> None:
    """Evaluates and prints."""
    trained = Trained.load(_WORKDIR.value, _MESH.value)
    config = trained.run.config
    batches = _BATCHES.value or config.evaluation.batches
    data = TextPipeline(config.data, config.seed)
    evaluate = Evaluator(trained.run, data, _SPLIT.value, batches)
    with jax.set_mesh(trained.run.mesh):
        losses = evaluate(trained.parameters)
    if _FORMAT.value == "json":
        print(json.dumps({"step": trained.step, "split": _SPLIT.value, **losses}))
        return
    print(f"step {trained.step}, {_SPLIT.value} split, {batches} batches")
    print(f"{'':24}{'nats/token':>12}{'bits/token':>12}")
    for name, loss in losses.items():
        domain = name.removeprefix("eval/loss").removeprefix("/") or "all"
        print(f"{domain:24}{loss:12.4f}{loss / math.log(2):12.4f}")


if __name__ == "__main__":
    command_line.run(main)
