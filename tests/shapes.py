"""What the tests check of the shapes that annotations give: every call of routing, dispatch and layers.

`install` is called by conftest.py before anything of these packages is imported. From then on a
call with arrays of other shapes or dtypes, or in which one letter stands for two sizes, raises
`jaxtyping.TypeCheckError`. Processes that tests start are not checked.
"""

import sys
import typing
from collections.abc import Callable, Iterator
from typing import Any

from beartype import beartype
from jaxtyping import AbstractArray, install_import_hook

PACKAGES = ["moe_jax.routing", "moe_jax.dispatch", "moe_jax.layers"]


def install() -> None:
    """Lets every module of these packages be checked that is imported after this."""
    early = [name for name in sys.modules if name.startswith(tuple(PACKAGES))]
    assert not early, f"imported before the check of shapes was installed: {early}"
    install_import_hook(PACKAGES, f"{__name__}.check_arrays")


def check_arrays(function: Callable) -> Callable:
    """Makes a function that jaxtyping made from a signature check those annotations that have shapes.

    Others are mypy's business: a type checker would refuse an int for a float at run time. A
    dataclass's fields have none, because its instances are rebuilt by `jax.tree.map`, `vmap` and
    `eval_shape` with lifted arrays, shardings or None in them.
    """
    hints = {name: hint for name, hint in function.__annotations__.items() if has_shapes(hint)}
    if not hints:
        return function
    function.__annotations__ = hints
    return beartype(function)


def has_shapes(hint: Any) -> bool:
    """Whether an annotation names a shape anywhere."""
    return any(isinstance(part, type) and issubclass(part, AbstractArray) for part in parts(hint))


def parts(hint: Any) -> Iterator[Any]:
    """The annotation and all that it is made of; what a `Callable` takes and gives is left out."""
    yield hint
    if typing.get_origin(hint) is not Callable:
        for argument in typing.get_args(hint):
            yield from parts(argument)
