"""Configs are trees of components; here they become JSON, come back, are checked and compared.

A component is written as its fields plus a `"type"` tag, its module and name, so that a swapped one
(another router, another optimizer) is rebuilt as what it was. `moe_jax.component` says which classes
a tag may name.
"""

import copy
import dataclasses
import enum
import math
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from moe_jax import component
from moe_jax.errors import UserError, names_instead

TYPE_TAG = "type"


def encode(value: Any) -> Any:
    """A config as JSON-ready dicts, lists and scalars.

    Raises:
      UserError: a component's class could not be found again by its tag.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {TYPE_TAG: component.tag(type(value)), **fields}
    if isinstance(value, Mapping):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    if isinstance(value, enum.Enum):
        return value.value
    return value


def decode(tree: Any, origins: Any = None) -> Any:
    """Rebuilds a config from `encode`'s output; imports nothing but moe_jax's own modules.

    Args:
      tree: the JSON tree.
      origins: what the file says of the modules that are not moe_jax's, see `component.origins`.

    Raises:
      UserError: an unknown type or field, or a value that its field does not take.
    """
    if isinstance(tree, list):
        return tuple(decode(item, origins) for item in tree)
    if not isinstance(tree, Mapping):
        return tree
    if TYPE_TAG not in tree:
        return {key: decode(item, origins) for key, item in tree.items()}
    name = tree[TYPE_TAG]
    if not isinstance(name, str):
        raise UserError(
            f"config.json has the type {name!r}; a type is a string such as module:Name."
        )
    module = name.rpartition(":")[0]
    cls = component.find(name, origins.get(module) if isinstance(origins, Mapping) else None)
    hints = typing.get_type_hints(cls)
    known = {field.name for field in dataclasses.fields(cls) if field.init}
    values = {}
    for key, item in tree.items():
        if key == TYPE_TAG:
            continue
        if key not in known:
            instead = names_instead(key, sorted(known), "fields", component.documentation(cls))
            raise UserError(f"{cls.__name__} has no field {key!r}; {instead}.")
        value, hint = decode(item, origins), hints[key]
        if isinstance(hint, type) and issubclass(hint, enum.Enum):
            value = _choice(f"{cls.__name__}.{key}", value, hint)
        values[key] = value
    try:
        return cls(**values)
    except TypeError as error:  # An abstract class, or a field without a default that is missing.
        raise UserError(
            f"config.json names {name}, which cannot be made of {sorted(values)}: {error}."
        ) from error


def _choice(name: str, value: Any, choices: type[enum.Enum]) -> enum.Enum:
    try:
        return choices(value)
    except ValueError as error:
        known = ", ".join(str(choice.value) for choice in choices)
        raise UserError(f"{name} is {value!r}; it must be one of {known}.") from error


def classes(config: Any) -> set[type]:
    """The classes of all components of a config."""
    return {type(part) for _, part in components(config)}


def components(config: Any, path: str = "config") -> Iterator[tuple[str, Any]]:
    """Yields (path, component) for a config and all components in it."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        yield path, config
        for field in dataclasses.fields(config):
            yield from components(getattr(config, field.name), f"{path}.{field.name}")
    elif isinstance(config, Mapping):
        for key, item in config.items():
            yield from components(item, f"{path}.{key}")
    elif isinstance(config, (list, tuple)):
        for i, item in enumerate(config):
            yield from components(item, f"{path}[{i}]")


def check_types(config: Any, path: str = "config") -> None:
    """Checks every scalar field against its annotation and range, in the whole tree.

    Raises:
      UserError: a value has another type than its field, is outside its range, or is no number.
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
                if dataclasses.is_dataclass(item):
                    check_types(item, f"{name}[{i}]")
        elif typing.get_origin(hint) is dict:
            _check_instance(name, value, dict)
            for key, item in value.items():
                _check_instance(f"{name}[{key!r}]", item, typing.get_args(hint)[1])
    if isinstance(config, component.Component):
        config.check_ranges(path)


def _check_instance(name: str, value: Any, hint: type) -> None:
    if hint is float:
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
    elif hint is int:
        good = isinstance(value, int) and not isinstance(value, bool)
    else:
        good = isinstance(value, hint)
    if not good:
        raise UserError(
            f"{name} is {value!r}, of type {type(value).__name__}; it must be {hint.__name__}."
        )
    if hint is float and not math.isfinite(value):
        raise UserError(f"{name} is {value}; it must be a finite number.")


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
