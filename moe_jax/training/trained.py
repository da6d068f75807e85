"""A finished or running run, opened to be used: its config and its newest good parameters."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath

from moe_jax.data.corpus import CorpusData
from moe_jax.data.interface import Pipeline
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.decoding.generation import generate_texts
from moe_jax.errors import UserError
from moe_jax.parallel.mesh import parse_mesh
from moe_jax.training import experiment, metrics
from moe_jax.training.checkpoints import Checkpoints
from moe_jax.training.evaluator import Evaluator
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
        """The model with the checkpoint's arrays."""
        return self.run.abstract_model.merge(self.parameters, self.variables)

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

    def evaluate(self, split: str | None = None, batches: int | None = None) -> metrics.Record:
        """`eval/<metric>` on held-out data and `eval/<metric>/<domain>`; defaults are the config's."""
        config = self.run.config
        evaluate = Evaluator(
            self.run,
            self.open_data(),
            split or config.data.held_out_split,
            batches or config.evaluation.batches,
        )
        with jax.set_mesh(self.run.mesh):
            return evaluate(self.parameters, self.variables)

    def generate(self, prompts: Sequence[str], **options: Any) -> list[str]:
        """A text for each prompt; options as in `moe_jax.decoding.generation.generate_texts`."""
        return generate_texts(self.model, self.run.mesh, self.tokenizer, prompts, **options)

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
        step = checkpoints.newest_good(to_train=False) if step is None else step
        if step is None:
            raise UserError(
                f"workdir {workdir} has no checkpoint yet; train it further, or lower "
                "checkpoint.every."
            )
        with jax.set_mesh(run.mesh):
            state = run.restore(checkpoints, step)
        return cls(epath.Path(workdir), run, step, state.parameters, state.variables)


def load(workdir: epath.PathLike, mesh: str = "", step: int | None = None) -> Trained:
    """Opens a run; see `Trained.load`."""
    return Trained.load(workdir, mesh, step)


def evaluate(
    run: Trained | epath.PathLike, split: str | None = None, batches: int | None = None
) -> metrics.Record:
    """What a run, or the run in a folder, reaches on held-out data; see `Trained.evaluate`."""
    return _opened(run).evaluate(split, batches)


def generate(run: Trained | epath.PathLike, prompts: Sequence[str], **options: Any) -> list[str]:
    """Texts by a run, or by the run in a folder; see `Trained.generate`."""
    return _opened(run).generate(prompts, **options)


def _opened(run: Trained | epath.PathLike) -> Trained:
    return run if isinstance(run, Trained) else Trained.load(run)
