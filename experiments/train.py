"""Trains the model of a config, or continues a run.

    python experiments/train.py --config=configs/quickstart.py --workdir=runs/mine \
        [--steps=500] [--config.model.num_experts=16]

Running the same command again continues the run from its newest good checkpoint.
"""

from absl import flags

from moe_jax import command_line
from moe_jax.training import loop

_CONFIG = command_line.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
_STEPS = flags.DEFINE_integer("steps", None, "Total number of steps; default: the config's.")


def main() -> None:
    """Trains and says where the results are."""
    config = command_line.experiment(_CONFIG.value)
    if _STEPS.value is not None:
        config.steps = _STEPS.value
    records = loop.train(config, _WORKDIR.value)
    print(
        f"step {records[-1]['step']}: held-out loss {records[-1]['eval/loss']:.4f} nats per token"
    )
    print(f"results are in {_WORKDIR.value}: report.png, metrics.jsonl, config.json, checkpoints/")


if __name__ == "__main__":
    command_line.run(main)
