"""Held-out loss of a run and what else its task measures, in total and per domain.

The command itself is moe_jax/commands/evaluate.py, which an installed package has, too:
python -m moe_jax evaluate ...
"""

from moe_jax import command_line
from moe_jax.commands import evaluate

if __name__ == "__main__":
    command_line.run_command(evaluate)
