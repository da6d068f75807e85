"""A finished or running run, opened to be used: its config and its newest good parameters."""

import dataclasses
from typing import Any

import jax
from etils import epath

from moe_jax.data.corpus import CorpusData
from moe_jax.data.interface import Pipeline
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.errors import UserError
from moe_jax.parallel.mesh import parse_mesh
from moe_jax.training import experiment
from moe_jax.training.checkpoints import Checkpoints
from moe_jax.training.run import Run


@dataclasses.dataclass(frozen=True)
class Trained:
    """A run at one of its checkpoints.

    Attributes:
      workdir: the run's folder.
      run: built on the mesh it is used on, which need not be the one it was trained on.
      step: of the checkpoint.
      parameters, variables: nested dicts of arrays.
    """

    workdir: epath.Path
    run: Run
    step: int
    parameters: Any
    variables: Any

    @property
    def model(self) -> Any:
        """The model with the checkpoint's numbers."""
        return self.run.definition.merge(self.parameters, self.variables)

    @property
    def tokenizer(self) -> Tokenizer:
        """The run's own.

        Raises:
          UserError: the run's data are no text.
        """
        data = self.run.config.data
        if not isinstance(data, CorpusData):
            raise UserError(
                f"workdir {self.workdir} holds a run on {type(data).__name__}, which is no text, so "
                "it has no tokenizer; name a run on text."
            )
        return data.tokenizer.load(self.workdir)

    def open_data(self) -> Pipeline:
        """The run's data, in the tokens that it was trained on."""
        return self.run.config.data.reopen(self.run.config.seed, self.workdir)

    @classmethod
    def load(cls, workdir: epath.PathLike, mesh: str = "", step: int | None = None) -> "Trained":
        """Opens a run.

        Args:
          workdir: the run's folder.
          mesh: such as `data:2,expert:4`; empty for the run's own.
          step: of the checkpoint; None for the newest good one.

        Raises:
          UserError: there is no run, no such good checkpoint, or the mesh does not fit.
        """
        config = experiment.load(workdir)
        config.mesh = parse_mesh(mesh, config.mesh)
        run = Run.build(config)
        checkpoints = Checkpoints(epath.Path(workdir) / "checkpoints")
        if step is not None and step not in checkpoints.steps():
            raise UserError(
                f"workdir {workdir} has no checkpoint of step {step}; it has those of "
                f"{', '.join(map(str, checkpoints.steps())) or 'no step'} (checkpoint.keep says how "
                "many are kept)."
            )
        step = checkpoints.newest_good() if step is None else step
        if step is None:
            raise UserError(
                f"workdir {workdir} has no checkpoint yet; train it further, or lower "
                "checkpoint.every."
            )
        with jax.set_mesh(run.mesh):
            state = run.restore(checkpoints, step)
        return cls(epath.Path(workdir), run, step, state.parameters, state.variables)
