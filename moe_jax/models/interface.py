"""What every model's config offers to the trainer."""

import abc
from typing import Any

import jax

from moe_jax.component import Component


class ModelConfig(Component, abc.ABC):
    """A component of a config that builds a model; the model keeps it as `.config`."""

    @abc.abstractmethod
    def validate(self) -> None:
        """Raises UserError for a model that could not be built."""

    @abc.abstractmethod
    def build(self, key: jax.Array) -> Any:
        """Creates the model with freshly drawn parameters."""

    @property
    @abc.abstractmethod
    def moe_layers(self) -> list[Any]:
        """Names of the MoE layers, in the order of the layers of the model's reports.

        A model of one stack names them by the index of their block, others by stack and index, such
        as `encoder/1`.
        """

    @abc.abstractmethod
    def split_dimensions(self) -> list[tuple[str, int, str]]:
        """(field, size, mesh axis) of every dimension that a mesh axis must divide."""
