"""The models of a paper in one config file: a table of rows, one of which --config=FILE:ROW names.

ROWS = {"64b_64e": Row("GLaM 64B/64E.", lambda: decoder(64, 8192), cost="574 hours.")}

def get_config(row: str = "") -> Experiment:
    return chosen(ROWS, row, __file__)
"""

import dataclasses
import runpy
from collections.abc import Callable, Mapping
from typing import Any

from moe_jax.configuration import changed
from moe_jax.errors import UserError, names_instead
from moe_jax.parallel.mesh import AXES, MeshConfig
from moe_jax.published import Published
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


@dataclasses.dataclass(frozen=True)
class Row:
    """One model of a paper. Texts are sentences, empty where nothing is known.

    Attributes:
      title: what it is.
      build: makes its config, of new objects at each call.
      published: numbers of the paper that are counted and compared.
      result: what the paper reached with it.
      cost: machine, hours and the like that the paper names.
      ours: what it reached here.
      note: what else a reader must know, such as what the paper leaves open.
      pods: how it lies on machines.
    """

    title: str
    build: Callable[[], Experiment]
    published: tuple[Published, ...] = ()
    result: str = ""
    cost: str = ""
    ours: str = ""
    note: str = ""
    pods: tuple[PodLayout, ...] = ()


def chosen(rows: Mapping[str, Row], name: str, file: str) -> Experiment:
    """A new config of the row that is named; of the only row where no name is given.

    Args:
      rows: of the file.
      name: what follows the colon of --config=FILE:ROW, empty for nothing.
      file: the config file, for the user.

    Raises:
      UserError: there is no such row, or several and no name.
    """
    return _find(rows, name, file).build()


def pods_of(config: str) -> tuple[PodLayout, ...]:
    """How what --config names lies on machines; nothing where the file has no rows.

    Raises:
      UserError: see `chosen`.
    """
    file, _, name = config.partition(":")
    rows = runpy.run_path(file).get("ROWS")
    return _find(rows, name, file).pods if rows else ()


def _find(rows: Mapping[str, Row], name: str, file: str) -> Row:
    if not name and len(rows) == 1:
        (name,) = rows
    if name in rows:
        return rows[name]
    if not name:
        raise UserError(
            f"--config={file} names no row; write --config={file}:{next(iter(rows))}, or another of "
            f"{', '.join(rows)}."
        )
    instead = names_instead(name, rows, "rows", f"--config={file} without a row")
    raise UserError(f"--config={file}:{name} names no row of the file; {instead}.")
