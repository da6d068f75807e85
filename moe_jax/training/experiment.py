"""The root config: everything that determines a run."""

import dataclasses
import json
from typing import Any

from etils import epath

from moe_jax import configuration
from moe_jax.data.pipelines import TextData
from moe_jax.data.tokenizers import ByteTokenizer
from moe_jax.dispatch.dropless import Dropless
from moe_jax.dispatch.einsum import Einsum
from moe_jax.dispatch.gather import Gather
from moe_jax.dispatch.grouped_matmul.interface import GroupedMatmul
from moe_jax.errors import UserError
from moe_jax.layers.moe import MoEConfig, number_of_groups
from moe_jax.models.decoder_lm import DecoderLMConfig
from moe_jax.parallel.mesh import MeshConfig
from moe_jax.routing.capacity import Capacity
from moe_jax.routing.catalogue import ROUTERS
from moe_jax.routing.losses import Losses
from moe_jax.tasks.language_modeling import LanguageModeling
from moe_jax.tasks.masked_language_modeling import MaskedLanguageModeling
from moe_jax.tasks.task import Task
from moe_jax.training.optimizers import AdamW, Optimizer


@dataclasses.dataclass
class Logging:
    """Attributes: every: steps between records in metrics.jsonl."""

    every: int = 10


@dataclasses.dataclass
class Checkpointing:
    """Attributes: every: steps between checkpoints; keep: how many of the newest are kept."""

    every: int = 100
    keep: int = 2


@dataclasses.dataclass
class Evaluation:
    """Attributes: every: steps between evaluations (0: only at the end); batches: per evaluation."""

    every: int = 0
    batches: int = 8


@dataclasses.dataclass
class Experiment:
    """One training run.

    Attributes:
      seed: of parameters, data order, dropout and router noise.
      steps: total number of steps.
      skip_nonfinite: on a loss or gradient that is not finite, drop the update and go on; False
        stops the run.
      model, task, data, optimizer, mesh, logging, checkpoint, evaluation: the components.
    """

    seed: int = 0
    steps: int = 1000
    skip_nonfinite: bool = False
    model: DecoderLMConfig = dataclasses.field(default_factory=DecoderLMConfig)
    task: Task = dataclasses.field(default_factory=LanguageModeling)
    data: TextData = dataclasses.field(default_factory=TextData)
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
        at_least = {
            "seed": (self.seed, 0),
            "steps": (self.steps, 1),
            "logging.every": (self.logging.every, 1),
            "checkpoint.every": (self.checkpoint.every, 1),
            "checkpoint.keep": (self.checkpoint.keep, 1),
            "evaluation.every": (self.evaluation.every, 0),
            "evaluation.batches": (self.evaluation.batches, 1),
        }
        for name, (value, least) in at_least.items():
            if value < least:
                raise UserError(f"{name} is {value}; it must be at least {least}.")
        for component in (self.model, self.data, self.optimizer, self.mesh):
            component.validate()
        self.task.validate(self.model)
        self._validate_lengths()
        self._validate_mesh()

    def _validate_lengths(self) -> None:
        if self.data.sequence_length > self.model.max_length:
            raise UserError(
                f"data.sequence_length is {self.data.sequence_length}, longer than the "
                f"model.max_length={self.model.max_length} positions; raise max_length."
            )
        if self.model.vocab_size < ByteTokenizer.vocab_size:
            raise UserError(
                f"model.vocab_size is {self.model.vocab_size}, smaller than the tokenizer's "
                f"{ByteTokenizer.vocab_size} ids; raise it."
            )

    def _validate_mesh(self) -> None:
        model, mesh = self.model, self.mesh
        divisible = [
            ("data.batch_size", self.data.batch_size, "data x expert", mesh.token_shards),
            ("model.num_heads", model.num_heads, "model", mesh.model),
            ("model.mlp_width", model.mlp_width, "model", mesh.model),
            ("model.vocab_size", model.vocab_size, "model", mesh.model),
        ]
        name = "model.experts_by_layer" if model.experts_by_layer else "model.num_experts"
        for num_experts in model.experts_of_layers if model.moe_every else ():
            divisible.append((name, num_experts, "expert", mesh.expert))
        for name, value, axis, devices in divisible:
            if value % devices:
                raise UserError(
                    f"{name} is {value}, which the {devices} devices of mesh axis {axis} do not "
                    "divide; change one of them."
                )
        if model.moe_every:
            tokens = self.data.batch_size * self.data.sequence_length
            number_of_groups(tokens, model.moe.group_size, mesh.token_shards)


# The only types that a config.json may name.
COMPONENTS: tuple[type, ...] = (
    Experiment,
    DecoderLMConfig,
    MoEConfig,
    *ROUTERS,
    Losses,
    Capacity,
    Dropless,
    Einsum,
    Gather,
    GroupedMatmul,
    LanguageModeling,
    MaskedLanguageModeling,
    TextData,
    AdamW,
    MeshConfig,
    Logging,
    Checkpointing,
    Evaluation,
)

# What may differ between a run and its continuation.
_MAY_CHANGE = ("config.mesh", "config.logging", "config.checkpoint", "config.steps")

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
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is damaged ({error}); restore it or use a new workdir.") from error


def load(workdir: epath.PathLike) -> Experiment:
    """Rebuilds the config of the run in `workdir`."""
    return configuration.decode(read_record(workdir)["config"], COMPONENTS)


def check_can_be_rebuilt(config: Experiment) -> None:
    """Checks before training that `load` will understand the config.json of this run.

    Raises:
      UserError: a component's type is missing from COMPONENTS.
    """
    configuration.decode(configuration.encode(config), COMPONENTS)


def check_continues(workdir: epath.PathLike, config: Experiment, text_sha256: str) -> None:
    """Checks that `config` and the text may continue the run in `workdir`.

    Raises:
      UserError: another field than the mesh, logging, checkpointing or steps differs (all that
        differ are named), or the dataset has another text than the run began with.
    """
    record = read_record(workdir)
    old, new = record["config"], configuration.encode(config)
    changed = [
        f"{path} (the run has {before!r}, you ask for {after!r})"
        for path, before, after in configuration.differences(old, new)
        if not path.startswith(_MAY_CHANGE)
    ]
    if changed:
        raise UserError(
            f"workdir {workdir} holds another run: {', '.join(changed)}; use a new --workdir or the "
            "run's values."
        )
    if record["dataset"]["sha256"] != text_sha256:
        raise UserError(
            f"data.dataset {config.data.dataset} now has the sha256 {text_sha256[:12]}, but the run "
            f"in {workdir} began with {record['dataset']['sha256'][:12]}; use a new --workdir or "
            "prepare the text of that run."
        )
