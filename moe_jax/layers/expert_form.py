"""What an expert is: the contract of `MoEConfig.experts`, and experts that are any NNX module.

Axis letters: E experts, of which a device has E/X (E_X in annotations); R rows, d width.
"""

import abc
import dataclasses
import math

import jax
from flax import nnx
from jaxtyping import Array, Float, Key, Shaped

from moe_jax.component import Component
from moe_jax.dispatch.interface import Network, Product
from moe_jax.errors import UserError
from moe_jax.layers.initializers import Scale
from moe_jax.parallel.mesh import MODEL


class ExpertForm(Component, abc.ABC):
    """A component of a config that draws the experts' arrays and says how experts work on rows.

    `moe_jax.layers.feed_forward.FeedForwardForm` is the usual one; `ModuleForm` takes any module.
    """

    @property
    def needs_slots(self) -> bool:
        """Whether experts work on slots only, not on rows of which each expert has another number."""
        return False

    @abc.abstractmethod
    def axes(self) -> dict[str, tuple[str, ...]]:
        """Dimension names of each array by its name, the first of them "experts"."""

    @abc.abstractmethod
    def draw(
        self,
        leading: tuple[int, ...],
        width: int,
        mlp_width: int,
        scale: Scale,
        key: Key[Array, ""],
    ) -> dict[str, Shaped[Array, "..."]]:
        """The initial arrays of many experts.

        Args:
          leading: dimensions before those of one expert's arrays, such as (E,).
          width: d.
          mlp_width: of each expert.
          scale: how matrices start.
          key: PRNG key of the layer, whose first part of three is the router's.

        Returns:
          name -> [*leading, ...] float32, by the names of `axes`.
        """

    @abc.abstractmethod
    def network(self, width: int, mlp_width: int, dropout_rate: float) -> Network:
        """How one device's experts work; its outputs are added up over the mesh axis `model`."""


@dataclasses.dataclass
class ModuleForm(ExpertForm):
    """Experts of any NNX module: inherit, and say in `build` what one expert is.

    Every device of the mesh axis `model` holds its experts whole.
    """

    @abc.abstractmethod
    def build(self, width: int, mlp_width: int, key: Key[Array, ""]) -> nnx.Module:
        """One expert: a module whose only variables are `nnx.Param`, called with rows [R, d] alone."""

    @property
    def needs_slots(self) -> bool:
        """Yes: a module says nothing of the products in it."""
        return True

    def axes(self) -> dict[str, tuple[str, ...]]:
        """See `ExpertForm.axes`."""
        shapes = self._arrays_of(self._abstract(8, 8))
        return {name: ("experts", *["features"] * leaf.ndim) for name, leaf in shapes.items()}

    def draw(
        self,
        leading: tuple[int, ...],
        width: int,
        mlp_width: int,
        scale: Scale,
        key: Key[Array, ""],
    ) -> dict[str, Shaped[Array, "..."]]:
        """See `ExpertForm.draw`; the module has its own initial values, so `scale` is not read."""
        keys = jax.random.split(jax.random.fold_in(key, 5), math.prod(leading))
        drawn = jax.vmap(lambda k: self._arrays_of(self.build(width, mlp_width, k)))(keys)
        return {name: array.reshape(*leading, *array.shape[1:]) for name, array in drawn.items()}

    def network(self, width: int, mlp_width: int, dropout_rate: float) -> "ModuleExpert":
        """See `ExpertForm.network`."""
        return ModuleExpert(self, width, mlp_width)

    def apply(
        self,
        arrays: dict[str, Shaped[Array, "..."]],
        rows: Float[Array, "R d"],
        width: int,
        mlp_width: int,
    ) -> Float[Array, "R d"]:
        """One expert with its arrays on rows [R, d]: [R, d]."""
        module = self._abstract(width, mlp_width)
        definition, state = nnx.split(module)
        values = [arrays[name] for name in self._arrays_of(module)]
        return nnx.merge(definition, jax.tree.unflatten(jax.tree.structure(state), values))(rows)

    def _abstract(self, width: int, mlp_width: int) -> nnx.Module:
        return nnx.eval_shape(lambda: self.build(width, mlp_width, jax.random.key(0)))

    def _arrays_of(self, module: nnx.Module) -> dict[str, jax.Array]:
        """The module's arrays in the order of its leaves."""
        arrays = {}
        for path, variable in nnx.to_flat_state(nnx.state(module)):
            name = "_".join(["expert", *map(str, path)])
            if not isinstance(variable, nnx.Param) or name in arrays:
                raise UserError(
                    f"moe.experts is {type(self).__name__}, whose module has {name} of kind "
                    f"{type(variable).__name__}; all its variables must be nnx.Param, with names that "
                    "differ."
                )
            arrays[name] = variable.get_value()
        return arrays


@dataclasses.dataclass(frozen=True)
class ModuleExpert:
    """A `moe_jax.dispatch.interface.Network` on slots: each expert's rows through its module.

    Attributes:
      form: of the module.
      width, mlp_width: it is built with.
    """

    form: ModuleForm
    width: int
    mlp_width: int

    def up(
        self,
        weights: dict[str, Shaped[Array, "..."]],
        rows: Float[Array, "E_X R d"],
        product: Product,
    ) -> dict[str, Float[Array, "E_X R d"]]:
        """The rows as they are: the module is one step."""
        return {"rows": rows}

    def down(
        self,
        weights: dict[str, Shaped[Array, "..."]],
        hidden: dict[str, Float[Array, "E_X R d"]],
        keys: Key[Array, "E_X R"] | None,
        product: Product,
    ) -> Float[Array, "E_X R d"]:
        """[E/X, R, d] to [E/X, R, d], this device's share of a sum over `model`."""

        def one(arrays: dict[str, jax.Array], rows: jax.Array) -> jax.Array:
            return self.form.apply(arrays, rows, self.width, self.mlp_width)

        return jax.vmap(one)(weights, hidden["rows"]) / jax.lax.axis_size(MODEL)
