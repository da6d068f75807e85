"""How a published model lies on a machine: what a config file says of pods, beside its PUBLISHED.

PODS = (PodLayout("v4:8x8x16", MeshConfig(data=32, expert=8, model=4)),)
"""

import dataclasses
import runpy
from collections.abc import Mapping, Sequence
from typing import Any

from moe_jax.configuration import changed, differences, encode
from moe_jax.errors import UserError
from moe_jax.parallel.mesh import AXES, MeshConfig, parse_mesh
from moe_jax.pods.hardware import topology
from moe_jax.training.experiment import Experiment


@dataclasses.dataclass(frozen=True)
class PodLayout:
    """One way to train a config on one machine.

    Attributes:
      topology: the machine, as `moe_jax.pods.hardware.topology` reads it.
      mesh: over all of its devices.
      changes: path of a config field -> its value here, such as `microbatches` or `model.remat`:
        what saves memory; the note says where that changes what is computed.
      note: what the authors must have done otherwise, or where the machine is not theirs.
    """

    topology: str
    mesh: MeshConfig
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    note: str = ""

    def apply(self, config: Experiment) -> Experiment:
        """The config with this mesh and these changes.

        Raises:
          UserError: a change names no field, or a choice that the field has not.
        """
        axes = {axis: getattr(self.mesh, axis) for axis in AXES}
        mesh = dataclasses.replace(config.mesh, **axes)
        return changed(config, {"mesh": mesh, **self.changes})


def pods_of(filename: str) -> tuple[PodLayout, ...]:
    """PODS of a config file, empty where it has none."""
    return runpy.run_path(filename).get("PODS", ())


def laid_out(
    config: Experiment, layouts: Sequence[PodLayout], name: str, mesh: str = ""
) -> tuple[Experiment, str]:
    """The config as it is trained on a machine.

    Args:
      config: with the user's changes, which yield to those of a layout.
      layouts: of its file.
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
            known = ", ".join(layout.topology for layout in layouts) or "none"
            raise UserError(
                f"--topology is {name}, for which the config has no mesh (it has those of: {known}); "
                "name one of them, or give --mesh, which compile_pod.py --search finds."
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
