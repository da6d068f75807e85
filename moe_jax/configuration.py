"""Configs are trees of plain dataclasses; here they become JSON, come back, and are compared.

A dataclass is written as its fields plus a `"type"` tag, so that a swapped component (another
router, another optimizer) is rebuilt as what it was. Only allow-listed types are ever built.
"""

import copy
import dataclasses
import enum
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moe_jax.errors import UserError

TYPE_TAG = "type"


def encode(value: Any) -> Any:
    """A config as JSON-ready dicts, lists and scalars."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {TYPE_TAG: type(value).__name__, **fields}
    if isinstance(value, Mapping):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    if isinstance(value, enum.Enum):
        return value.value
    return value


def decode(tree: Any, allowed: Sequence[type]) -> Any:
    """Rebuilds a config from `encode`'s output.

    Args:
      tree: the JSON tree.
      allowed: the dataclasses that may be built.

    Raises:
      UserError: an unknown type or field.
    """
    if isinstance(tree, list):
        return tuple(decode(item, allowed) for item in tree)
    if not isinstance(tree, Mapping):
        return tree
    if TYPE_TAG not in tree:
        return {key: decode(item, allowed) for key, item in tree.items()}
    types = {t.__name__: t for t in allowed}
    name = tree[TYPE_TAG]
    if name not in types:
        raise UserError(
            f"config type {name!r} is not one that can be rebuilt; known are {', '.join(types)}."
        )
    cls = types[name]
    hints = typing.get_type_hints(cls)
    values = {}
    for key, item in tree.items():
        if key == TYPE_TAG:
            continue
        if key not in hints:
            raise UserError(f"{name} has no field {key!r}; its fields are {', '.join(hints)}.")
        value = decode(item, allowed)
        hint = hints[key]
        is_enum = isinstance(hint, type) and issubclass(hint, enum.Enum)
        values[key] = hint(value) if is_enum else value
    return cls(**values)


def check_types(config: Any, path: str = "config") -> None:
    """Checks every scalar field against its annotation, in the whole tree.

    Raises:
      UserError: a value has another type than its field.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, hint, name = getattr(config, field.name), hints[field.name], f"{path}.{field.name}"
        if dataclasses.is_dataclass(value):
            check_types(value, name)
            if isinstance(hint, type) and dataclasses.is_dataclass(hint):
                _check_instance(name, value, hint)
        elif isinstance(hint, type):
            _check_instance(name, value, hint)
        elif typing.get_origin(hint) is tuple:
            _check_instance(name, value, tuple)
            for i, item in enumerate(value):
                _check_instance(f"{name}[{i}]", item, typing.get_args(hint)[0])


def _check_instance(name: str, value: Any, hint: type) -> None:
    if getattr(hint, "_is_protocol", False):
        good = False  # A component that is no dataclass could not be written to config.json.
    elif hint is float:
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
    elif hint is int:
        good = isinstance(value, int) and not isinstance(value, bool)
    else:
        good = isinstance(value, hint)
    if not good:
        raise UserError(
            f"{name} is {value!r}, of type {type(value).__name__}; it must be {hint.__name__}."
        )


def differences(old: Any, new: Any, path: str = "config") -> Iterator[tuple[str, Any, Any]]:
    """Yields (path, old, new) for each difference between two encoded configs."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in {**old, **new}:
            yield from differences(old.get(key), new.get(key), f"{path}.{key}")
    elif old != new:
        yield path, old, new


def changed(config: Any, changes: Mapping[str, Any]) -> Any:
    """A copy of a config with other values in some fields.

    Args:
      config: a tree of dataclasses.
      changes: path of a field, such as `model.moe.group_size`, -> its value; in this order.

    Raises:
      UserError: a path names no field, or its value is none of the field's choices.
    """
    new = copy.deepcopy(config)
    for path, value in changes.items():
        *parents, name = path.split(".")
        node = new
        for parent in parents:
            node = getattr(node, parent, None)
        if not hasattr(node, name):
            raise UserError(f"a change of {path} names no field of the config.")
        old = getattr(node, name)
        try:
            setattr(node, name, type(old)(value) if isinstance(old, enum.Enum) else value)
        except ValueError as error:
            choices = ", ".join(str(choice) for choice in type(old))
            raise UserError(
                f"{path} is changed to {value!r}; it must be one of {choices}."
            ) from error
    return new


def config_line(component: Any) -> str:
    """The Python expression that makes a component, with its fields that are not the default."""
    defaults = {
        field.name: field.default_factory() if callable(field.default_factory) else field.default
        for field in dataclasses.fields(component)
    }
    arguments = [
        f"{name}={literal(getattr(component, name))}"
        for name, default in defaults.items()
        if getattr(component, name) != default
    ]
    return f"{type(component).__name__}({', '.join(arguments)})"


def literal(value: Any) -> str:
    """The Python expression of a field's value; components as by `config_line`."""
    if dataclasses.is_dataclass(value):
        return config_line(value)
    if isinstance(value, enum.Enum):
        return f"{type(value).__name__}.{value.name}"
    return repr(value)
