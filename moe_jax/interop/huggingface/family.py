"""What a family's file offers, and how it reads fields of config.json."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from moe_jax.dispatch.dropless import Dropless
from moe_jax.errors import UserError
from moe_jax.interop.huggingface.table import Tensor
from moe_jax.layers.feed_forward import Activation, FeedForwardForm
from moe_jax.layers.moe import MoEConfig
from moe_jax.layers.shared_experts import BranchMix
from moe_jax.models.stack import ComputeDtype, StackConfig
from moe_jax.routing.router import Router

# A config.json.
Fields = Mapping[str, Any]

_Component = TypeVar("_Component")

_ACTIVATIONS = {
    "relu": Activation.RELU,
    "gelu": Activation.GELU_EXACT,
    "gelu_new": Activation.GELU,
    "silu": Activation.SILU,
}


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
      model_type: its name in config.json.
      config_from_hf: our config of a config.json; raises UserError where we have no such model.
      config_to_hf: the inverse; what it cannot express it leaves out.
      tensors: of a config's checkpoint.
      ignored: regular expression of tensors that are not read, such as copies of tied ones.
    """

    model_type: str
    config_from_hf: Callable[[Fields], Any]
    config_to_hf: Callable[[Any], dict[str, Any]]
    tensors: Callable[[Any], list[Tensor]]
    ignored: str = "(?!)"


def required(hf: Fields, name: str) -> Any:
    """A field that has no default.

    Raises:
      UserError: it is missing.
    """
    if name not in hf:
        raise UserError(f"config.json has no {name}, which a {hf['model_type']} needs; add it.")
    return hf[name]


def refuse_other(hf: Fields, **supported: Any) -> None:
    """Raises UserError for a field whose value is not the only one supported; it may be missing."""
    for name, value in supported.items():
        if hf.get(name, value) != value:
            raise UserError(
                f"config.json has {name}={hf[name]!r}; only {name}={value!r} is supported for "
                f"{hf['model_type']}."
            )


def copied(hf: Fields, names: Mapping[str, str]) -> dict[str, Any]:
    """Fields that only have another name there: {ours: theirs}."""
    return {ours: required(hf, theirs) for ours, theirs in names.items()}


def copied_back(config: Any, names: Mapping[str, str]) -> dict[str, Any]:
    """The inverse of `copied`."""
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


def activation(hf: Fields, name: str) -> Activation:
    """The activation that a field names.

    Raises:
      UserError: it is not one of ours.
    """
    if hf[name] not in _ACTIVATIONS:
        raise UserError(
            f"config.json has {name}={hf[name]!r}; supported are {', '.join(_ACTIVATIONS)}."
        )
    return _ACTIVATIONS[hf[name]]


def activation_name(ours: Activation) -> str:
    """The inverse of `activation`."""
    return next(name for name, value in _ACTIVATIONS.items() if value == ours)


def compute_dtype(hf: Fields) -> ComputeDtype:
    """bfloat16 for models saved in it, otherwise float32."""
    name = hf.get("dtype", hf.get("torch_dtype"))
    return ComputeDtype.BFLOAT16 if name == "bfloat16" else ComputeDtype.FLOAT32


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
