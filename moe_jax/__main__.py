"""`python -m moe_jax COMMAND --flag=value ...`: what an installed package can do without a checkout."""

import importlib
import pkgutil
import sys

from moe_jax import command_line, commands
from moe_jax.errors import UserError

NAMES = sorted(module.name for module in pkgutil.iter_modules(commands.__path__))


def main() -> None:
    """Runs the command that the first argument names.

    Raises:
      UserError: it names none.
    """
    name = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if name not in NAMES:
        given = f"command is {name!r}" if name else "a command is missing"
        raise UserError(
            f"{given}; write python -m moe_jax COMMAND, with one of {', '.join(NAMES)}, and --help after "
            "it for its flags."
        )
    command_line.run_command(importlib.import_module(f"{commands.__name__}.{name}"))


if __name__ == "__main__":
    command_line.report_to_user(main)
