"""What a config is made of: a class is enough.

A router, model, task, optimizer or dataset is a dataclass that inherits from its kind's base, which
inherits from `Component`. In config.json it has the tag "module:Name". Nothing has to be registered,
and a class may stand anywhere: in moe_jax, in a config file, in another package, in a notebook.

A tag is only ever looked up: among moe_jax's own modules, which are imported for it, and among the
components that exist in the process because the user imported them (`import_named` is what
--import does). Nothing else is imported or run for what a file says.
"""

import dataclasses
import hashlib
import importlib
import importlib.util
import inspect
import logging
import pathlib
import sys
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

from moe_jax.errors import UserError, where_it_failed
from moe_jax.renamed import RENAMED

_LOG = logging.getLogger(__name__)
_PACKAGE = __name__.partition(".")[0]
_NOTEBOOK = "__main__"


class Component:
    """Base of all that a config is made of: ordinary dataclasses, compared and hashed by value.

    Fields may be changed until a run is built from them; a component that is a key somewhere must
    not be changed any more.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Gives the class the hash before @dataclass sees it and takes it away."""
        super().__init_subclass__(**kwargs)
        if "__hash__" not in cls.__dict__:
            cls.__hash__ = Component.__hash__  # type: ignore[method-assign]

    def __hash__(self) -> int:
        values = (getattr(self, field.name) for field in dataclasses.fields(self))  # type: ignore[arg-type]
        return hash((type(self), *map(_hashable, values)))

    def check_ranges(self, path: str) -> None:
        """Checks the component's own fields against the ranges that `field` declared.

        Args:
          path: what the user calls the component, such as `model.moe`.

        Raises:
          UserError: a value is outside its field's range.
        """
        for declared in dataclasses.fields(self):  # type: ignore[arg-type]
            allowed = _declared(type(self), declared.name).range
            value = getattr(self, declared.name)
            if allowed is not None and not allowed.holds(value):
                raise UserError(f"{path}.{declared.name} is {value}; it must be {allowed}.")


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers that a field takes; None for no bound. NaN is in no range."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def holds(self, value: Any) -> bool:
        """Whether a number is in it."""
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        low = self.at_least if self.above is None else self.above
        high = self.at_most if self.below is None else self.below
        if high is None:
            return f"at least {low}" if self.above is None else f"above {low}"
        opening, closing = "[" if self.above is None else "(", "]" if self.below is None else ")"
        return f"in {opening}{low}, {high}{closing}"


@dataclasses.dataclass(frozen=True)
class _Declared:
    """What `field` says of a field."""

    range: Range | None = None
    factor: bool = False


_DECLARED = "declared"


def field(
    default: Any,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    factor: bool = False,
) -> Any:
    """A field of a component whose values have a range: `k: int = field(1, at_least=1)`.

    The range is checked with the types of a run's config, and where a component checks itself. A
    subclass that gives the field another default keeps its range.

    Args:
      default: of the field.
      at_least, above, at_most, below: the range.
      factor: the number only multiplies what is computed. The compiled step takes it as an argument, so
        that configs with other factors share the program: where a router routes and an optimizer is
        built, the field then holds a [] float32 array, of which Python cannot ask whether it is 0.
    """
    declared = _Declared(Range(at_least, above, at_most, below), factor)
    return dataclasses.field(default=default, metadata={_DECLARED: declared})


def _declared(cls: type, name: str) -> _Declared:
    """What the first class that says anything of a field says of it."""
    for base in cls.__mro__:
        found = base.__dict__.get("__dataclass_fields__", {}).get(name)
        if found is not None and _DECLARED in found.metadata:
            return found.metadata[_DECLARED]
    return _Declared()


def factors_of(component: Any) -> dict[str, float]:
    """The component's own fields that are declared as factors, see `field`."""
    names = [declared.name for declared in dataclasses.fields(component)]
    return {
        name: getattr(component, name) for name in names if _declared(type(component), name).factor
    }


def _hashable(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple((key, _hashable(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(map(_hashable, value))
    return value


def tag(cls: type) -> str:
    """What config.json calls a class: its module and its name.

    A config file or script is no module that others can import by the name it has while it runs
    (`config_config`, `__main__`), so the name of its file stands for it.

    Raises:
      UserError: the class is defined inside a function, or is no dataclass.
    """
    if "<locals>" in cls.__qualname__:
        raise UserError(
            f"{cls.__qualname__} is defined inside a function, where nothing can find it again; "
            "define it at the top of a module."
        )
    if not issubclass(cls, Component):
        raise UserError(
            f"{cls.__qualname__} is no component, so config.json could not name it; let it inherit "
            "from the base of its kind, such as moe_jax.Router, or from moe_jax.Component."
        )
    if "__dataclass_fields__" not in cls.__dict__ and inspect.get_annotations(cls):
        raise UserError(
            f"{cls.__qualname__} has fields but is no dataclass, so they would be lost; write "
            "@dataclasses.dataclass above it."
        )
    return f"{_module_name(cls)}:{cls.__qualname__}"


def _module_name(cls: type) -> str:
    file = source(cls)
    if file is None or file.stem in ("__init__", cls.__module__.rpartition(".")[2]):
        return cls.__module__
    return file.stem


def source(cls: type) -> pathlib.Path | None:
    """The file that defines a class; None in a notebook."""
    module = sys.modules.get(cls.__module__)
    file = getattr(module, "__file__", None)
    return pathlib.Path(file).resolve() if file else None


def is_own(cls: type) -> bool:
    """Whether a class is moe_jax's."""
    return cls.__module__.partition(".")[0] == _PACKAGE


def documentation(cls: type) -> str:
    """Where all fields of a class are listed, for an error's sentence."""
    if is_own(cls):
        return f"python -m pydoc {cls.__module__}.{cls.__qualname__}"
    return f"the class {cls.__qualname__} in {source(cls) or 'the notebook'}"


def find(name: str, origin: Any = None) -> type:
    """The class of a tag.

    Args:
      name: "module:Name"; a name alone, and names of earlier versions, are read as the library's.
      origin: what the file says of the tag's module, see `origins`.

    Raises:
      UserError: there is no such component in moe_jax or in what the user imported.
    """
    if name in RENAMED:
        if ":" not in name:
            _say_once(
                "config.json has types without modules, as moe_jax wrote until version 0.1; they are "
                "read as moe_jax's own classes."
            )
        name = RENAMED[name]
    module, _, qualified = name.rpartition(":")
    if module.partition(".")[0] == _PACKAGE and qualified:
        cls = _attribute(module, qualified)
        if isinstance(cls, type) and issubclass(cls, Component) and dataclasses.is_dataclass(cls):
            return cls
        raise UserError(
            f"config.json names {name}, which moe_jax does not have; it was written by another "
            "version of moe_jax, or by hand."
        )
    named = [cls for cls in _components() if cls.__qualname__ == qualified and not is_own(cls)]
    exact = [cls for cls in named if module in (cls.__module__, _module_name(cls))]
    same = exact or [cls for cls in named if _answers(cls, module)]
    modules = sorted({_module_name(cls) for cls in same})
    if len(modules) > 1:
        raise UserError(
            f"config.json names {name}, which may be that of {' or of '.join(modules)}; import only the "
            "one that the run was made with."
        )
    if same:  # The newest, because a cell of a notebook may be run twice.
        _compare_source(same[-1], origin)
        return same[-1]
    file = _said_of(origin, "file")
    raise UserError(
        f"config.json names {name or 'a class without a name'}, which is not in moe_jax and was "
        f"not imported; name the module or file that defines it, such as --import={file or module or 'FILE'}"
        " (in Python: import it first)."
    )


def _attribute(module: str, qualified: str) -> Any:
    if not _is_module(module):
        return None
    value: Any = importlib.import_module(module)
    for part in qualified.split("."):
        value = getattr(value, part, None)
    return value


def _is_module(module: str) -> bool:
    """Whether moe_jax has a module of this name, which is looked up as a file and not imported."""
    parts = module.split(".")
    folder = pathlib.Path(__file__).parent.joinpath(*parts[1:])
    if not all(part.isidentifier() for part in parts) or parts[-1] == _NOTEBOOK:
        return False
    return folder.with_suffix(".py").is_file() or (folder / "__init__.py").is_file()


def _components(cls: type = Component) -> Iterator[type]:
    below: type
    for below in cls.__subclasses__():
        yield below
        yield from _components(below)


def _answers(cls: type, module: str) -> bool:
    """Whether a class may be the one of that name in a tag's module, though the module is another.

    A class of a notebook, and one that version 0.1 wrote without its module, may be in any module
    that the user imported.
    """
    return module in (cls.__module__.rpartition(".")[2], _NOTEBOOK, "")


def _compare_source(cls: type, origin: Any) -> None:
    file = source(cls)
    before = _said_of(origin, "sha256")
    if file is not None and before is not None and before != _sha256(file):
        _say_once(
            f"{file} is not what it was when config.json was written (sha256 {before[:12]}, now "
            f"{_sha256(file)[:12]}); {cls.__qualname__} is used as it is now."
        )


def _said_of(origin: Any, name: str) -> str | None:
    """What a file says of a module, which may be anything: the file may be a stranger's."""
    value = origin.get(name) if isinstance(origin, Mapping) else None
    return value if isinstance(value, str) else None


def origins(classes: set[type]) -> dict[str, dict[str, Any]]:
    """Where classes that are not moe_jax's come from: module of the tag -> file and its sha256."""
    found = {}
    for cls in classes:
        file = source(cls)
        if not is_own(cls):
            known = file is not None and file.is_file()
            found[tag(cls).partition(":")[0]] = {
                "file": str(file) if known else None,
                "sha256": _sha256(file) if known and file else None,
            }
    return found


def _sha256(file: pathlib.Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def import_named(name: str) -> ModuleType:
    """Imports what the user names by --import: a module, or a file.

    Raises:
      UserError: there is no such module or file, or it fails.
    """
    try:
        if not name.endswith(".py"):
            return importlib.import_module(name)
        path = pathlib.Path(name).expanduser().resolve()
        loaded = sys.modules.get(path.stem)
        if loaded is not None:
            if getattr(loaded, "__file__", None) == str(path):
                return loaded
            raise UserError(
                f"--import={name}: a module named {path.stem} is loaded already, from "
                f"{getattr(loaded, '__file__', 'Python')}; rename the file."
            )
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if spec is None or spec.loader is None or not path.is_file():
            raise UserError(f"--import={name} is no file; name a Python file or a module.")
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[path.stem]
            raise
        return module
    except ModuleNotFoundError as error:
        raise UserError(
            f"--import={name}: there is no module {error.name}; name an installed module, or a "
            "file such as my_router.py."
        ) from error
    except UserError:
        raise
    except Exception as error:  # Whatever the user's own code raises.
        told = where_it_failed(error, pathlib.Path(name).expanduser().resolve())
        raise UserError(f"--import={name} cannot be imported ({told}).") from error


def import_again(modules: dict[str, dict[str, Any]]) -> None:
    """Imports in another process of ours what the user imported in this one; see `origins`."""
    for module, origin in modules.items():
        try:
            importlib.import_module(module)
        except ModuleNotFoundError:
            if not origin["file"]:
                raise
            import_named(origin["file"])


_SAID: set[str] = set()


def _say_once(sentence: str) -> None:
    if sentence not in _SAID:
        _SAID.add(sentence)
        _LOG.warning(sentence)
