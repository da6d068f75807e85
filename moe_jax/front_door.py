"""The documentation page docs/api.md: what stands behind each name of `import moe_jax`."""

import inspect
from typing import Any

import moe_jax


def public_names() -> list[str]:
    """The names of the front door, by alphabet."""
    return sorted(name for name in dir(moe_jax) if not name.startswith("_") and _is_public(name))


def _is_public(name: str) -> bool:
    # Submodules that were imported are attributes of the package, too.
    return not inspect.ismodule(getattr(moe_jax, name))


def api_page() -> str:
    """One row for each name: what it is called with, its first sentence, and where it lives."""
    rows = [_row(name, getattr(moe_jax, name)) for name in public_names()]
    return _PAGE.format(rows="\n".join(rows))


def _row(name: str, value: Any) -> str:
    sentence = (inspect.getdoc(value) or "").split("\n\n")[0].replace("\n", " ")
    kind = "class" if isinstance(value, type) else "function"
    escaped = sentence.replace("|", "\\|")
    return f"| `moe.{name}` | {kind} | {escaped} | `{value.__module__}` |"


_PAGE = """# Public names

Written by `python experiments/api_table.py`; a test compares. `import moe_jax as moe` takes under 0.1 s,
because each name is loaded when it is first used. What a name takes, gives and refuses is in its
docstring: `help(moe.MoE)`.

| name | | what it is | module |
|---|---|---|---|
{rows}
"""
