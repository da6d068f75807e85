"""The documentation page docs/routers.md: every published router of this folder.

A router's file says in PUBLISHED what papers do with it; the page and the tests that run over all
routers find them here.
"""

import importlib
import pkgutil

from moe_jax import routing
from moe_jax.configuration import config_line
from moe_jax.routing.published import PublishedRouter


def published_routers() -> tuple[PublishedRouter, ...]:
    """Those of all files of this folder, by year."""
    names = (
        f"{routing.__name__}.{module.name}" for module in pkgutil.iter_modules(routing.__path__)
    )
    modules = [importlib.import_module(name) for name in names if name != __name__]
    found = [row for module in modules for row in getattr(module, "PUBLISHED", ())]
    return tuple(sorted(found, key=lambda row: row.year))


ENTRIES = published_routers()


def routers_page() -> str:
    """The documentation page: one row for each entry."""
    rows = [
        "| "
        + " | ".join(
            (
                entry.name,
                entry.paper,
                entry.formula,
                _sum_of_gates(entry.gates),
                entry.balance or "nothing",
                "yes" if entry.router.leak is None else f"no: {entry.router.leak}",
                f"`{config_line(entry.router)}`",
                f"`{config_line(entry.capacity)}`" if entry.capacity else "its own slots",
            )
        )
        + " |"
        for entry in ENTRIES
    ]
    return _PAGE.format(rows="\n".join(rows))


def _sum_of_gates(gates: tuple[float, float]) -> str:
    low, high = (f"{value:.3g}" for value in gates)
    return low if low == high else f"{low} to {high}"


_PAGE = """# Routers

Written by `python experiments/router_table.py` from the PUBLISHED tables in moe_jax/routing; a test compares.

One line of a config swaps the routing: `config.model.moe.router = ...`, and usually
`config.model.moe.capacity = ...`. K, E and the coefficients below fit 8 experts; the papers'
numbers are in the classes' docstrings. *Gates sum to* is meant for a token of which nothing was
dropped. A router that is not causal is refused in a decoder unless `model.accept_leak` is true or
the model is `bidirectional`. Every token-choice router takes any priority `order`, a second pass
(`no_token_left_behind`) and any of the `losses`; those with one linear map also `exploration`,
`logit_soft_cap` and `dtype`. Coefficients are those of the paper where it sums the losses of all
layers, as the task's `auxiliary_reduction=sum` does; OLMoE's is a mean.

| name | paper | who goes where, with which gate g | gates sum to | balanced by | causal | router | capacity |
|---|---|---|---|---|---|---|---|
{rows}
"""
