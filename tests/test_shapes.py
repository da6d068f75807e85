"""Shapes are written on what takes or returns arrays, and the tests check them."""

import ast
import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import Array, Float, TypeCheckError, jaxtyped

from moe_jax.dispatch import soft
from moe_jax.layers.normalization import RMSNorm
from moe_jax.layers.positions import rotate
from moe_jax.routing import losses
from moe_jax.routing.router import SoftAssignment, TokenAssignment
from tests.shapes import PACKAGES, check_arrays

ROOT = pathlib.Path(__file__).parents[1]
S, E, K = 6, 4, 2
PROBABILITIES = jnp.full((S, E), 1 / E)
EXPERTS = jnp.zeros((S, K), jnp.int32)
MASK = jnp.ones(S, bool)
SOFT = SoftAssignment(jnp.ones((S, E, 1)), jnp.ones((S, E, 1)))


@pytest.mark.parametrize(
    ("call", "named"),
    [
        # Another number of dimensions, another dtype, and one letter of two sizes.
        (lambda: losses.importance(PROBABILITIES[0], MASK), "probabilities"),
        (lambda: losses.importance(PROBABILITIES, MASK.astype(jnp.int32)), "mask"),
        (lambda: losses.load_balancing(PROBABILITIES, EXPERTS, MASK[1:]), "mask"),
        (lambda: losses.load_balancing(PROBABILITIES, EXPERTS[1:], MASK), "experts"),
        (lambda: soft.fill(jnp.ones(S), SOFT), "x"),
        (lambda: rotate(jnp.ones((2, 3, 1, 4)), jnp.zeros((2, 4), jnp.int32)), "positions"),
        (lambda: RMSNorm(4)(jnp.ones(4, jnp.int32)), "x"),
    ],
)
def test_wrong_shapes_raise_in_every_package(call, named):
    with pytest.raises(TypeCheckError, match=f"checking parameter '{named}'"):
        call()


def test_wrong_shapes_raise_under_jit_and_vmap():
    with pytest.raises(TypeCheckError, match="checking parameter 'mask'"):
        jax.jit(losses.importance)(PROBABILITIES, MASK[1:])
    with pytest.raises(TypeCheckError, match="checking parameter 'mask'"):
        jax.vmap(losses.importance)(PROBABILITIES[None], MASK[None, 1:])


def test_results_are_checked_and_what_has_no_shape_is_not():
    @jaxtyped(typechecker=check_arrays)
    def transposed(x: Float[Array, "S d"], scale: float) -> Float[Array, "S d"]:
        return scale * x.T

    assert transposed(jnp.ones((3, 3)), 2).shape == (3, 3)  # No float, which mypy accepts.
    with pytest.raises(TypeCheckError, match="checking the return value"):
        transposed(jnp.ones((3, 2)), 2.0)


def test_fields_of_dataclasses_hold_whatever_a_tree_has():
    assignment = TokenAssignment(EXPERTS, EXPERTS, EXPERTS.astype(jnp.float32), capacity=3)
    for leaf in (None, jax.ShapeDtypeStruct((5, S, K), jnp.int32)):
        assert jax.tree.map(lambda _, leaf=leaf: leaf, assignment).experts is leaf


# How an annotation names an array without its shape, and what may stand around arrays with one.
ARRAYS = {"Array", "ArrayLike", "ndarray"}
WITH_SHAPE = {"Bool", "Float", "Int", "Key", "Num", "Shaped"}


def functions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    """Public functions and methods, constructors and calls, with their names."""
    for child in ast.iter_child_nodes(node):
        name = getattr(child, "name", "")
        if name.startswith("_") and name not in ("__init__", "__call__"):
            continue
        if isinstance(child, ast.ClassDef):
            yield from functions(child, f"{prefix}{name}.")
        elif isinstance(child, ast.FunctionDef):
            yield prefix + name, child


def names_bare_array(annotation: ast.AST | None) -> bool:
    """Whether an array without a shape is anywhere in it; but for what a `Callable` takes and gives.

    `Arrays` (a router's parameters by name) and trees of weights are no arrays: each has a shape of
    its own, which the docstring of what makes them says.
    """
    if annotation is None:
        return False
    if isinstance(annotation, ast.Subscript):
        outer = ast.unparse(annotation.value).rpartition(".")[2]
        if outer in WITH_SHAPE or outer == "Callable":
            return False
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        return names_bare_array(ast.parse(annotation.value, mode="eval").body)
    name = getattr(annotation, "attr", getattr(annotation, "id", None))
    return name in ARRAYS or any(map(names_bare_array, ast.iter_child_nodes(annotation)))


def without_shapes(source: str) -> list[str]:
    """Names of the functions of which an argument or the result is an array without a shape."""
    found = []
    for name, function in functions(ast.parse(source)):
        arguments = [node for node in ast.walk(function.args) if isinstance(node, ast.arg)]
        annotations = [*(argument.annotation for argument in arguments), function.returns]
        if any(map(names_bare_array, annotations)):
            found.append(name)
    return found


FILES = [
    path for name in PACKAGES for path in sorted((ROOT / name.replace(".", "/")).rglob("*.py"))
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / "moe_jax")))
def test_every_public_function_says_the_shapes_of_its_arrays(path):
    assert without_shapes(path.read_text()) == []


def test_an_array_without_a_shape_is_found_wherever_it_stands():
    source = """
def bare(x: jax.Array) -> None: ...
def inside(x: int) -> tuple[Float[Array, "S E"], dict[str, jax.Array] | None]: ...
def quoted(x: "np.ndarray | float") -> None: ...
class Layer:
    def __call__(self, x: Float[Array, "S d"], *, mask: Array | None) -> None: ...
    def _own(self, x: jax.Array) -> None: ...
def shaped(x: Float[Array, "S E"] | None, step: Callable[[Array], Array]) -> list[Int[Array, ""]]:
    def own(x: Array) -> None: ...
"""
    assert without_shapes(source) == ["bare", "inside", "quoted", "Layer.__call__"]
