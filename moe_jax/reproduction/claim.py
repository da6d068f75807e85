"""A claim of a paper: what it says, the runs that test it, what is measured, and its picture.

A claim is one file in experiments/claims/ whose CLAIM is a `Claim`; files that begin with `_` are
what several share.
"""

import dataclasses
import enum
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from ml_collections import config_flags

from moe_jax.configuration import changed, literal
from moe_jax.errors import UserError, user_error_behind
from moe_jax.reproduction.measurements import test_split
from moe_jax.reproduction.verdicts import Finding
from moe_jax.training.experiment import Experiment
from moe_jax.training.trained import Trained

if TYPE_CHECKING:
    from moe_jax.reproduction.results import Results


class Profile(enum.StrEnum):
    """What the runs are sized for: two CPU cores, or one GPU."""

    CPU = "cpu"
    GPU = "gpu"


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Something measured of a finished run, in the run's process and with its devices.

    Attributes:
      name: unique among all claims, with all that the value depends on ("test at factor 0.5"): a
        run that several claims share is measured once.
      measure: the run -> a JSON-ready value; a function of a module, or a functools.partial of one,
        because it is sent to another process.
    """

    name: str
    measure: Callable[[Trained], Any]


TEST = Measurement("test", test_split)
"""`eval/loss` and what else the task measures, in total and by domain, on the test split."""


@dataclasses.dataclass(frozen=True)
class Side:
    """One of the things that a claim compares: a config, trained once for each seed.

    Attributes:
      name: in tables and legends, unique in the claim.
      file: of the config, from the root of the project.
      changes: path of a config field -> its value here; components, too.
      learning_rates: all are tried with the first seed, and the one with the lowest validation loss
        is the side's. The same for all sides of a claim, unless a rate is what is claimed.
      seeds: of the runs.
      measurements: of each run at the side's learning rate.
    """

    name: str
    file: str
    changes: Mapping[str, Any]
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    measurements: tuple[Measurement, ...] = (TEST,)

    def config(self, learning_rate: float, seed: int) -> Experiment:
        """Of one run.

        Raises:
          UserError: a change names no field.
        """
        own = {"optimizer.learning_rate": learning_rate, "seed": seed}
        return changed(read_config(self.file), {**self.changes, **own})

    def described(self) -> str:
        """The config file and the changes, as one line."""
        changes = ", ".join(f"{path}={literal(value)}" for path, value in self.changes.items())
        return f"{self.file}{' with ' if changes else ''}{changes}"


def read_config(file: str) -> Experiment:
    """What --config=`file` gives: what get_config() of a config file returns, or of `FILE:ROW`.

    Raises:
      UserError: get_config() does.
    """
    try:
        return config_flags.config_flags._ConfigFileParser("config").parse(file)
    except UserError as error:
        raise UserError(str(user_error_behind(error))) from error


@dataclasses.dataclass(frozen=True)
class ResultTable:
    """The paper's figures beside ours.

    Attributes:
      columns: headings, the first of them of the row's name.
      rows: cells in Markdown.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim.

    Attributes:
      name: the file's, without `.py`.
      title: the claim in a sentence.
      statement: Markdown: what the papers say, with figures and where they stand, how it is tested
        here and what differs; what the literature contests, with both sides.
      sides: the profile -> what is trained; empty where nothing is.
      findings: the results -> what they say of each statement, by `verdicts.compare` or
        `verdicts.agree`.
      table: the results -> the paper's figures beside ours.
      draw: draws the results on an empty figure with constrained layout, like the paper's.
    """

    name: str
    title: str
    statement: str
    sides: Callable[[Profile], Sequence[Side]]
    findings: Callable[["Results"], Sequence[Finding]]
    table: Callable[["Results"], ResultTable]
    draw: Callable[["Results", Figure], None]
