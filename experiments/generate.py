"""Continues prompts with a trained run; a run from text to text answers them.

The command itself is moe_jax/commands/generate.py, which an installed package has, too:
python -m moe_jax generate ...
"""

from moe_jax import command_line
from moe_jax.commands import generate

if __name__ == "__main__":
    command_line.run_command(generate)
