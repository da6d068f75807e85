"""Writes docs/api.md, the page of the names that `import moe_jax` gives.

python experiments/api_table.py [--output=docs/api.md]
"""

import pathlib

from absl import flags

from moe_jax import command_line
from moe_jax.front_door import api_page

_OUTPUT = flags.DEFINE_string("output", "docs/api.md", "Markdown file to write.")


def main() -> None:
    """Writes the page."""
    pathlib.Path(_OUTPUT.value).write_text(api_page())
    print(f"the page of public names is in {_OUTPUT.value}")


if __name__ == "__main__":
    command_line.run(main)
