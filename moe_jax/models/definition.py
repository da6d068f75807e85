"""A model without its numbers: its graph, and the shapes and dimension names of its parameters."""

import dataclasses
from typing import Any

import jax
from flax import nnx


@dataclasses.dataclass(frozen=True)
class ModelDefinition:
    """A model without its numbers.

    Attributes:
      graph: what `nnx.merge` needs to make a model of parameters.
      shapes: tree of ShapeDtypeStructs of the parameters.
      axes: the same tree with a tuple of dimension names at each leaf.
    """

    graph: nnx.GraphDef
    shapes: Any
    axes: Any

    @classmethod
    def of(cls, config: Any) -> "ModelDefinition":
        """From a model config with `build(key)`; allocates nothing."""
        model = nnx.eval_shape(lambda: config.build(jax.random.key(0)))
        graph, parameters = nnx.split(model)
        shapes = nnx.to_pure_dict(parameters)
        axes = nnx.to_pure_dict(
            jax.tree.map(
                _dimension_names, parameters, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
            )
        )
        return cls(graph, shapes, axes)

    def merge(self, parameters: Any) -> Any:
        """The model with these parameters."""
        return nnx.merge(self.graph, parameters)


def _dimension_names(variable: nnx.Variable) -> tuple[str, ...]:
    """A parameter inside a stacked period has one dimension more than it was declared with."""
    names = variable.get_metadata()["axes"]
    return ("layers",) * (variable.ndim - len(names)) + tuple(names)
