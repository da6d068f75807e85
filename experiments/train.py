"""Trains the model of a config, or continues a run.

The command itself is moe_jax/commands/train.py, which an installed package has, too:
python -m moe_jax train ...
"""

from moe_jax import command_line
from moe_jax.commands import train

if __name__ == "__main__":
    command_line.run_command(train)
