"""An abstract model: its graph, parameter shapes and dimension names, but no arrays."""

import dataclasses
from typing import Any

import jax
from flax import nnx

from moe_jax.layers.moe import Factor, MoE
from moe_jax.models.interface import ModelConfig
from moe_jax.routing.router import RouterFactors

# Arrays of a model, or what stands in their places: dicts in dicts, with leaves of one kind.
Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class AbstractModel:
    """A model without its arrays, which come in two trees of nested dicts.

    Attributes:
      graph: what `nnx.merge` needs to make a model of arrays.
      shapes: tree of ShapeDtypeStructs of the parameters, which gradients train.
      axes: the same tree with a tuple of dimension names at each leaf.
      variable_shapes, variable_axes: the same of all else that a model keeps, such as the routers'
        expert biases.
      factors: path of a MoE module -> the factors of its router, as the config says them.
      given_factors: [] float32 arrays in their places, see `with_factors`; empty for the config's.
    """

    graph: nnx.GraphDef
    shapes: Tree
    axes: Tree
    variable_shapes: Tree
    variable_axes: Tree
    factors: dict[str, RouterFactors] = dataclasses.field(default_factory=dict)
    given_factors: dict[str, RouterFactors] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, config: ModelConfig) -> "AbstractModel":
        """From a model config with `build(key)`; allocates nothing."""
        model = nnx.eval_shape(lambda: config.build(jax.random.key(0)))
        modules = moe_modules(model)
        for module_path, module in modules.items():
            module.path = module_path
        graph, (parameters, variables) = _split(model)
        return cls(
            graph,
            nnx.to_pure_dict(parameters),
            _axes(parameters),
            nnx.to_pure_dict(variables),
            _axes(variables),
            {path: RouterFactors.of(module.config.router) for path, module in modules.items()},
        )

    def with_factors(self, factors: dict[str, RouterFactors]) -> "AbstractModel":
        """The same, whose models compute with these arrays in place of the config's `factors`."""
        return dataclasses.replace(self, given_factors=factors)

    def merge(self, parameters: Tree, variables: Tree | None = None) -> Any:
        """The model with these arrays; most models have no variables."""
        model = nnx.merge(self.graph, parameters, {} if variables is None else variables)
        if self.given_factors:
            for path, module in moe_modules(model).items():
                module.take_factors(self.given_factors[path])
        return model


def moe_modules(model: nnx.Module) -> dict[str, MoE]:
    """The model's MoE modules by their paths, such as "stack/stages/0/blocks/1/mlp"."""
    return {
        "/".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, MoE)
    }


def arrays_of(model: nnx.Module) -> tuple[Tree, Tree]:
    """The parameters and the variables of a model, as nested dicts."""
    _, (parameters, variables) = _split(model)
    return nnx.to_pure_dict(parameters), nnx.to_pure_dict(variables)


def _split(model: nnx.Module) -> tuple[nnx.GraphDef, list[nnx.State]]:
    graph, *states = nnx.split(model, nnx.Param, Factor, ...)
    parameters, _, variables = states
    return graph, [parameters, variables]


def _axes(state: nnx.State) -> Tree:
    """Dimension names in place of the values of a state."""
    return nnx.to_pure_dict(
        jax.tree.map(_dimension_names, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    )


def _dimension_names(variable: nnx.Variable) -> tuple[str, ...]:
    """A parameter inside a stacked period has one dimension more than it was declared with."""
    names = variable.get_metadata()["axes"]
    return ("layers",) * (variable.ndim - len(names)) + tuple(names)
