"""A mixture of linear or logistic experts under a tree of gates, as a module.

Axis letters: B cases, n inputs, m outputs, E experts, N nodes of a level, b branches of a node.
"""

import dataclasses
import enum
import itertools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.component import field
from moe_jax.errors import UserError
from moe_jax.models.interface import ModelConfig
from moe_jax.models.mixtures import tree
from moe_jax.models.mixtures.tree import Tree


class Link(enum.StrEnum):
    """What an expert does to its linear output: nothing, or the logistic function."""

    IDENTITY = "identity"
    LOGISTIC = "logistic"


@dataclasses.dataclass
class MixtureConfig(ModelConfig):
    """A mixture of experts with one layer each.

    Attributes:
      num_inputs: n.
      num_outputs: m.
      branches: b of the gates of each level from the top: (8,) for eight experts under one gate
        (Jacobs et al. 1991), (2, 2, 2, 2) for a binary tree with 16 (Jordan and Jacobs 1994).
      link: of the experts.
      deviations: whether each expert has standard deviations of its own; they are 1 otherwise.
      init_range: weights and biases are uniform between this and its negative.
    """

    num_inputs: int = field(2, at_least=1)
    num_outputs: int = field(1, at_least=1)
    branches: tuple[int, ...] = (4,)
    link: Link = Link.IDENTITY
    deviations: bool = False
    init_range: float = field(0.5, above=0)

    @property
    def num_experts(self) -> int:
        """E."""
        return math.prod(self.branches)

    @property
    def moe_layers(self) -> list[int]:
        """Empty: every expert runs on every case, so there is no routing to report."""
        return []

    def split_dimensions(self) -> list[tuple[str, int, str]]:
        """See `ModelConfig`."""
        return [("model.branches", self.num_experts, "expert")]

    def validate(self) -> None:
        """Raises UserError for a mixture that could not be built."""
        self.check_ranges("model")
        if not self.branches or min(self.branches) < 1:
            raise UserError(
                f"model.branches is {self.branches}; give the branches of each level, such as (4,)."
            )

    def build(self, key: jax.Array) -> "Mixture":
        """Creates the mixture with freshly drawn parameters."""
        return Mixture(self, key)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MixtureOutput:
    """What a mixture says of a batch.

    Attributes:
      log_proportions: [B, E], log of the mixing proportions p.
      outputs: [B, E, m], of every expert.
      log_deviations: [E, m].
    """

    log_proportions: jax.Array
    outputs: jax.Array
    log_deviations: jax.Array

    @property
    def blended(self) -> jax.Array:
        """sum_i p_i o_i, [B, m]."""
        return jnp.einsum("be,bem->bm", jnp.exp(self.log_proportions), self.outputs)


class Mixture(nnx.Module):
    """Parameters `gates` (one [N, n + 1, b] for each level) and `experts` [E, n + 1, m]."""

    def __init__(self, config: MixtureConfig, key: jax.Array) -> None:
        self.config = nnx.static(config)
        rows = config.num_inputs + 1
        nodes = itertools.accumulate(config.branches, lambda a, b: a * b, initial=1)
        expert_key, *gate_keys = jax.random.split(key, len(config.branches) + 1)

        def uniform(key: jax.Array, *shape: int) -> jax.Array:
            limit = config.init_range
            return jax.random.uniform(key, shape, jnp.float32, -limit, limit)

        self.gates = nnx.List(
            nnx.Param(uniform(gate_key, count, rows, branches), axes=("router",) * 3)
            for gate_key, count, branches in zip(gate_keys, nodes, config.branches, strict=False)
        )
        shape = config.num_experts, rows, config.num_outputs
        self.experts = nnx.Param(
            uniform(expert_key, *shape), axes=("experts", "features", "features")
        )
        self.log_deviations = (
            nnx.Param(jnp.zeros((shape[0], shape[2]), jnp.float32), axes=("experts", "features"))
            if config.deviations
            else None
        )

    @property
    def tree(self) -> Tree:
        """The numbers, for the functions of `moe_jax.models.mixtures`."""
        experts = self.experts[...]
        deviations = (
            jnp.zeros_like(experts[:, 0])
            if self.log_deviations is None
            else self.log_deviations[...]
        )
        return Tree(tuple(gate[...] for gate in self.gates), experts, deviations)

    def __call__(self, inputs: jax.Array) -> MixtureOutput:
        """Runs the gates and every expert on [B, n] float32."""
        numbers = self.tree
        branches = tree.branch_log_probabilities(numbers.gates, inputs)
        outputs = tree.expert_outputs(numbers.experts, inputs)
        if self.config.link == Link.LOGISTIC:
            outputs = jax.nn.sigmoid(outputs)
        return MixtureOutput(tree.leaf_log_probabilities(branches), outputs, numbers.log_deviations)
