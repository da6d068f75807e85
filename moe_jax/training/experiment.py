"""The root config: everything that determines a run."""

import dataclasses
import json
import logging
from typing import Any

from etils import epath

from moe_jax import configuration
from moe_jax.component import Component, field
from moe_jax.data.interface import DataConfig
from moe_jax.data.pipelines import TextData
from moe_jax.errors import UserError
from moe_jax.layers.moe import a_group_size
from moe_jax.models.decoder_lm import DecoderLMConfig
from moe_jax.models.interface import ModelConfig
from moe_jax.parallel.mesh import MeshConfig
from moe_jax.tasks.language_modeling import LanguageModeling
from moe_jax.tasks.task import Task
from moe_jax.training import provenance
from moe_jax.training.optimizers import AdamW, Optimizer

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass
class Logging(Component):
    """Attributes: every: steps between records in metrics.jsonl."""

    every: int = field(10, at_least=1)


@dataclasses.dataclass
class Checkpointing(Component):
    """Attributes: every: steps between checkpoints; keep: how many of the newest are kept."""

    every: int = field(100, at_least=1)
    keep: int = field(2, at_least=1)


@dataclasses.dataclass
class Evaluation(Component):
    """Attributes: every: steps between evaluations (0: only at the end); batches: per evaluation."""

    every: int = field(0, at_least=0)
    batches: int = field(8, at_least=1)


@dataclasses.dataclass
class Experiment(Component):
    """One training run.

    Attributes:
      seed: of parameters, data order, dropout and router noise.
      steps: total number of steps.
      microbatches: parts that a step's batch is computed in, one after the other, to save memory.
      skip_nonfinite: on a loss, gradient or update that is not finite, drop the update and go on;
        False stops the run.
      skip_limit: so many dropped updates in a row stop the run, too.
      model, task, data, optimizer, mesh, logging, checkpoint, evaluation: the components.
    """

    seed: int = field(0, at_least=0, below=2**32)
    steps: int = field(1000, at_least=1)
    microbatches: int = field(1, at_least=1)
    skip_nonfinite: bool = False
    skip_limit: int = field(10, at_least=1)
    model: ModelConfig = dataclasses.field(default_factory=DecoderLMConfig)
    task: Task = dataclasses.field(default_factory=LanguageModeling)
    data: DataConfig = dataclasses.field(default_factory=TextData)
    optimizer: Optimizer = dataclasses.field(default_factory=AdamW)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    logging: Logging = dataclasses.field(default_factory=Logging)
    checkpoint: Checkpointing = dataclasses.field(default_factory=Checkpointing)
    evaluation: Evaluation = dataclasses.field(default_factory=Evaluation)

    def validate(self) -> None:
        """Checks every component alone, then that they fit together.

        Raises:
          UserError: one sentence that names the field, its value and what would be right.
        """
        configuration.check_types(self)
        for component in (self.model, self.data, self.optimizer, self.mesh):
            component.validate()
        self.task.validate(self.model, self.data)
        self.task.validate_microbatches(self.microbatches)
        self._validate_mesh()
        for path, tokens, group_size in self.task.moe_inputs(self.model, self.data):
            self._validate_groups(path, tokens, group_size)

    def with_group_sizes(self) -> "Experiment":
        """The same run with the groups of every MoE layer said in tokens, for counting."""
        changes: dict[str, Any] = {}
        for path, _, group_size in self.task.moe_inputs(self.model, self.data):
            changes |= {path: group_size, path.replace("group_size", "group_rows"): 1}
        return configuration.changed(self, changes)

    def _validate_mesh(self) -> None:
        """Checks that the mesh divides rows, and what it splits of the model."""
        batch_size, shards = self.data.batch_size, self.mesh.token_shards
        if batch_size % self.microbatches:
            raise UserError(
                f"microbatches is {self.microbatches}, which does not divide data.batch_size="
                f"{batch_size}; change one of them."
            )
        rows = batch_size // self.microbatches
        row_name = "data.batch_size / microbatches" if self.microbatches > 1 else "data.batch_size"
        divisible = [(row_name, rows, "data x expert", shards)]
        for path, size, axis in self.model.split_dimensions():
            divisible.append((path, size, axis, getattr(self.mesh, axis)))
        for name, value, axis, devices in divisible:
            if value % devices:
                raise UserError(
                    f"{name} is {value}, which the {devices} devices of mesh axis {axis} do not "
                    f"divide; make it a multiple, such as {-(-value // devices) * devices}, or "
                    "change the mesh."
                )

    def _validate_groups(self, path: str, tokens_per_row: int, group_size: int) -> None:
        """Checks that the tokens of a batch make whole groups, and shards have whole groups."""
        of = "microbatch" if self.microbatches > 1 else "batch"
        tokens = self.data.batch_size // self.microbatches * tokens_per_row
        shards = self.mesh.token_shards
        works = a_group_size(tokens, group_size, shards, tokens_per_row)
        if tokens % group_size:
            raise UserError(
                f"{path} is {group_size}, which does not divide the {tokens} tokens of a {of}; "
                f"{works}."
            )
        groups = tokens // group_size
        if groups % shards:
            raise UserError(
                f"a {of} has {groups} groups of {path}={group_size} tokens, which the {shards} "
                f"shards of mesh axes data x expert do not divide; {works}, or take fewer devices on "
                "these axes."
            )


# What may differ between a run and its continuation.
_MAY_CHANGE = (
    "config.mesh", "config.logging", "config.checkpoint", "config.steps", "config.skip_nonfinite",
    "config.skip_limit",
)  # fmt: skip
# So may what saves memory, of which another machine has more or less.
_SAVES_MEMORY = (".microbatches", ".remat", ".remat_moe", ".buffer_factor")

CONFIG_FILE = "config.json"


def read_record(workdir: epath.PathLike) -> dict[str, Any]:
    """What config.json of a run says.

    Raises:
      UserError: there is no run in `workdir`, or the file is damaged.
    """
    path = epath.Path(workdir) / CONFIG_FILE
    if not path.exists():
        raise UserError(f"workdir {workdir} has no {CONFIG_FILE}; name the folder of a run.")
    try:
        record = json.loads(path.read_text())
    except IsADirectoryError as error:
        raise UserError(
            f"workdir {workdir} has a folder {CONFIG_FILE} where the run's file should be; bring back a "
            "copy of the file."
        ) from error
    except ValueError as error:  # No JSON, or no UTF-8.
        raise UserError(f"{path} is damaged ({error}); bring back a copy of it.") from error
    if not isinstance(record, dict):
        raise UserError(f"{path} is damaged (no JSON object); bring back a copy of it.")
    return record


def load(workdir: epath.PathLike) -> Experiment:
    """Rebuilds the config of the run in `workdir`."""
    record = read_record(workdir)
    path = epath.Path(workdir) / CONFIG_FILE
    try:
        config = configuration.decode(record.get("config"), record.get("imports"))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if not isinstance(config, Experiment):
        raise UserError(
            f"{path} has no config of a run; bring back a copy of it, or name the folder of a run."
        )
    return config


def check_can_be_rebuilt(config: Experiment) -> None:
    """Checks before training that `load` will understand the config.json of this run.

    Raises:
      UserError: a component's class could not be found again.
    """
    configuration.decode(configuration.encode(config))


def check_continues(workdir: epath.PathLike, config: Experiment) -> None:
    """Checks that `config` may continue the run in `workdir`.

    Raises:
      UserError: another field than the mesh, logging, checkpointing, steps, what is done about numbers
        that are not finite, or what saves memory (`microbatches`, `remat`,
        `buffer_factor`) differs; all that differ are named.
    """
    # Rebuilt first, so that a run of an earlier version is compared in today's names and fields.
    old, new = configuration.encode(load(workdir)), configuration.encode(config)
    changed = [
        f"{path} (the run has {before!r}, you ask for {after!r})"
        for path, before, after in configuration.differences(old, new)
        if not path.startswith(_MAY_CHANGE) and not path.endswith(_SAVES_MEMORY)
    ]
    if changed:
        raise UserError(
            f"workdir {workdir} holds another run: {', '.join(changed)}; use a new --workdir or the "
            "run's values."
        )


def check_same_data(workdir: epath.PathLike, dataset: str, sha256: str) -> None:
    """Checks that the training data are those that the run in `workdir` began with.

    Raises:
      UserError: they are others.
    """
    began_with = read_record(workdir)["dataset"]["sha256"]
    if began_with != sha256:
        raise UserError(
            f"data.dataset {dataset} now has the sha256 {sha256[:12]}, but the run in {workdir} "
            f"began with {began_with[:12]}; use a new --workdir or prepare the data of that run."
        )


def check_same_numerics(workdir: epath.PathLike) -> None:
    """Checks that JAX computes as it did when the run in `workdir` began.

    Flags of XLA, which change the last bits only and differ between machines, are compared and said.

    Raises:
      UserError: a setting of JAX differs; all that differ are named.
    """
    began_with = read_record(workdir).get("numerics")
    if not began_with:  # A run of version 0.1.
        return
    now = provenance.numerics()
    changed = [
        f"{name} is {now[name]!r} and was {began_with[name]!r}"
        for name in now
        if name != "flags" and name in began_with and now[name] != began_with[name]
    ]
    if changed:
        raise UserError(
            f"workdir {workdir} holds a run that began with other settings of JAX, which train another "
            f"model: {', '.join(changed)}; set them as they were, or use a new --workdir."
        )
    before, after = set(began_with.get("flags", [])), set(now["flags"])
    if before != after:
        _LOG.warning(
            "The run in %s goes on with other flags of XLA, which may change the last bits: %s.",
            workdir,
            ", ".join(
                [f"{flag} is new" for flag in sorted(after - before)]
                + [f"{flag} is missing" for flag in sorted(before - after)]
            ),
        )


def say_change_of_rate(workdir: epath.PathLike, config: Experiment, step: int) -> None:
    """Says how the learning rate jumps where a run in `workdir` goes on from `step` to other `steps`."""
    old = load(workdir)
    before = float(old.optimizer.learning_rate_at(old.steps)(step))
    after = float(config.optimizer.learning_rate_at(config.steps)(step))
    if step < config.steps != old.steps and abs(after - before) > 1e-3 * max(before, after):
        _LOG.warning(
            "steps goes from %d to %d, and with it schedule=%s: step %d has the learning rate %.4g, where "
            "the run would have gone on with %.4g.",
            *(old.steps, config.steps, config.optimizer.schedule, step + 1, after, before),
        )
