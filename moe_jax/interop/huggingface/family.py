"""What a family's file offers, and what several families need."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from moe_jax.dispatch.dropless import Dropless
from moe_jax.errors import UserError
from moe_jax.interop.huggingface.fields import Fields
from moe_jax.interop.huggingface.files import Stored
from moe_jax.interop.huggingface.table import Tensor
from moe_jax.interop.huggingface.ties import Tables
from moe_jax.layers.feed_forward import Activation, FeedForwardForm
from moe_jax.layers.moe import MoEConfig
from moe_jax.layers.shared_experts import BranchMix
from moe_jax.models.stack import StackConfig
from moe_jax.routing.router import Router

_Component = TypeVar("_Component")

# The first name of each is the one that is written.
ACTIVATIONS = {
    "relu": Activation.RELU,
    "gelu": Activation.GELU_EXACT,
    "gelu_python": Activation.GELU_EXACT,
    "gelu_new": Activation.GELU,
    "gelu_pytorch_tanh": Activation.GELU,
    "gelu_fast": Activation.GELU,
    "silu": Activation.SILU,
    "swish": Activation.SILU,
}


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
      model_type: its name in config.json.
      read: our config of a config.json; raises UserError where we have no such model.
      config_to_hf: the inverse; what it cannot express it leaves out.
      tensors: of a config's checkpoint.
      aliases: further names of fields: {further name: field}.
      irrelevant: fields that change nothing that one of this family computes.
      tables: which tables of tokens of a folder are tied; see `Tables`.
      copies: tensors of a model that are written once more under another name: {name: the
        tensor's}.
      renamed: names of tensors that transformers 5 may give instead: (pattern, replacement) makes
        those of `tensors` of them.
      experts: names of an expert's gate, input and output, which transformers 5 may fuse over the
        experts; None where there are none to fuse.
      not_in_float16: ends of paths of parameters that stay as they are where float16 is asked for.
      unread: names of a folder's tensors that no model of the family computes with.
      tokens: fields about special tokens that transformers' config class has where config.json does
        not.
    """

    model_type: str
    read: Callable[[Fields], Any]
    config_to_hf: Callable[[Any], dict[str, Any]]
    tensors: Callable[[Any], list[Tensor]]
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    irrelevant: frozenset[str] = frozenset()
    tables: Callable[[Any, Mapping[str, Stored]], Tables] = lambda config, _: Tables(config)
    copies: Callable[[Any], dict[str, str]] = lambda _: {}
    renamed: tuple[tuple[str, str], ...] = ()
    experts: tuple[str, str, str] | None = None
    not_in_float16: tuple[str, ...] = ()
    unread: Callable[[Any, Mapping[str, Stored]], set[str]] = lambda *_: set()
    tokens: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def config_from_hf(self, hf: Mapping[str, Any]) -> Any:
        """Our config of a config.json.

        Raises:
          UserError: we have no such model, or a field is not known.
        """
        fields = Fields(hf, self.aliases)
        config = self.read(fields)
        fields.refuse_unread(self.irrelevant)
        return config


def copied_back(config: Any, names: Mapping[str, str]) -> dict[str, Any]:
    """Fields that only have another name there: {ours: theirs}."""
    return {theirs: getattr(config, ours) for ours, theirs in names.items()}


def component(value: Any, kind: type[_Component], name: str, family: str) -> _Component:
    """`value`, which a family wants to be of this very class.

    Raises:
      UserError: it is not.
    """
    if type(value) is not kind:
        raise UserError(
            f"{name} is {type(value).__name__}, but {family} needs {kind.__name__}; change it or choose "
            "another family."
        )
    return value


def activation(fields: Fields, name: str, default: str) -> Activation:
    """The activation that a field names.

    Raises:
      UserError: it is not one of ours.
    """
    return fields.choice(name, ACTIVATIONS, default)


def activation_name(ours: Activation) -> str:
    """The inverse of `activation`."""
    return next(name for name, value in ACTIVATIONS.items() if value == ours)


def dropless_moe(
    router: Router,
    experts: FeedForwardForm,
    shared_experts: int = 0,
    shared_mix: BranchMix = BranchMix.SUM,
) -> MoEConfig:
    """A MoE that drops no token, as transformers' do not."""
    return MoEConfig(
        router=router,
        dispatch=Dropless(),
        experts=experts,
        shared_experts=shared_experts,
        shared_mix=shared_mix,
    )


def moe_blocks(blocks: list[int], num_layers: int) -> dict[str, Any]:
    """The fields of a stack that say which blocks have a MoE."""
    if blocks == list(range(num_layers)):
        return {"moe_every": 1}
    return {"moe_every": 1 if blocks else 0, "moe_at": tuple(blocks)}


def dense_blocks(config: StackConfig) -> list[int]:
    """Indices of the blocks without a MoE."""
    return [block for block in range(config.num_layers) if block not in config.moe_layers]
