"""A config laid out for a machine, as a row of its file says (`moe_jax.training.rows`) or the user."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from moe_jax.configuration import differences, encode
from moe_jax.errors import UserError
from moe_jax.parallel.mesh import parse_mesh
from moe_jax.pods.hardware import topology
from moe_jax.training.experiment import Experiment
from moe_jax.training.rows import PodLayout


def laid_out(
    config: Experiment, layouts: Sequence[PodLayout], name: str, mesh: str = ""
) -> tuple[Experiment, str]:
    """The config as it is trained on a machine.

    Args:
      config: with the user's changes, which yield to those of a layout.
      layouts: of its row.
      name: of the machine, in either spelling.
      mesh: as on the command line; empty for the layout's.

    Returns:
      (config, note of its layout).

    Raises:
      UserError: there is no layout for the machine and no mesh either, or the mesh cannot be read.
    """
    wanted = topology(name)
    found = [layout for layout in layouts if topology(layout.topology) == wanted]
    if not found:
        if not mesh:
            known = ", ".join(layout.topology for layout in layouts)
            others = f"; name one that it has, {known}, or" if known else ", nor for another;"
            raise UserError(
                f"--topology is {name}, for which the config has no layout{others} give --mesh, which "
                "compile_pod.py --search finds."
            )
        return dataclasses.replace(config, mesh=parse_mesh(mesh, config.mesh)), ""
    laid = found[0].apply(config)
    laid.mesh = parse_mesh(mesh, laid.mesh)
    return laid, found[0].note


def changes_between(before: Experiment, after: Experiment) -> dict[str, Any]:
    """Path of each config field but the mesh's that differs -> its value after."""
    found = differences(encode(before), encode(after), "")
    paths = ((path.removeprefix("."), value) for path, _, value in found)
    return {path: value for path, value in paths if not path.startswith("mesh.")}
