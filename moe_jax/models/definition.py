"""A model without its numbers: its graph, and the shapes and dimension names of its parameters."""

import dataclasses
from typing import Any

import jax
from flax import nnx


@dataclasses.dataclass(frozen=True)
class ModelDefinition:
    """A model without its numbers, which come in two trees of nested dicts.

    Attributes:
      graph: what `nnx.merge` needs to make a model of numbers.
      shapes: tree of ShapeDtypeStructs of the parameters, which gradients train.
      axes: the same tree with a tuple of dimension names at each leaf.
      variable_shapes, variable_axes: the same of all else that a model keeps, such as the routers'
        expert biases.
    """

    graph: nnx.GraphDef
    shapes: Any
    axes: Any
    variable_shapes: Any
    variable_axes: Any

    @classmethod
    def of(cls, config: Any) -> "ModelDefinition":
        """From a model config with `build(key)`; allocates nothing."""
        model = nnx.eval_shape(lambda: config.build(jax.random.key(0)))
        graph, (parameters, variables) = _split(model)
        return cls(
            graph,
            nnx.to_pure_dict(parameters),
            _axes(parameters),
            nnx.to_pure_dict(variables),
            _axes(variables),
        )

    def merge(self, parameters: Any, variables: Any | None = None) -> Any:
        """The model with these numbers; most models have no variables."""
        return nnx.merge(self.graph, parameters, {} if variables is None else variables)


def numbers_of(model: nnx.Module) -> tuple[Any, Any]:
    """The parameters and the variables of a model, as nested dicts."""
    _, (parameters, variables) = _split(model)
    return nnx.to_pure_dict(parameters), nnx.to_pure_dict(variables)


def _split(model: nnx.Module) -> tuple[nnx.GraphDef, list[nnx.State]]:
    graph, *states = nnx.split(model, nnx.Param, ...)
    return graph, states


def _axes(state: nnx.State) -> Any:
    """Dimension names in place of the values of a state."""
    return nnx.to_pure_dict(
        jax.tree.map(_dimension_names, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    )


def _dimension_names(variable: nnx.Variable) -> tuple[str, ...]:
    """A parameter inside a stacked period has one dimension more than it was declared with."""
    names = variable.get_metadata()["axes"]
    return ("layers",) * (variable.ndim - len(names)) + tuple(names)
