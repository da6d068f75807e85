"""Prepares one of the project's datasets, once, so that training only reads it.

The command itself is moe_jax/commands/prepare_data.py, which an installed package has, too:
python -m moe_jax prepare_data ...
"""

from moe_jax import command_line
from moe_jax.commands import prepare_data

if __name__ == "__main__":
    command_line.run_command(prepare_data)
