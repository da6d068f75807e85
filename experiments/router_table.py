"""Writes docs/routers.md, the table of all routers, from the PUBLISHED tables in moe_jax/routing/.

python experiments/router_table.py [--output=docs/routers.md]
"""

import pathlib

from absl import flags

from moe_jax import command_line
from moe_jax.routing.catalogue import routers_page

_OUTPUT = flags.DEFINE_string("output", "docs/routers.md", "Markdown file to write.")


def main() -> None:
    """Writes the page."""
    pathlib.Path(_OUTPUT.value).write_text(routers_page())
    print(f"the table of routers is in {_OUTPUT.value}")


if __name__ == "__main__":
    command_line.run(main)
