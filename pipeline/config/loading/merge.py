"""Conversion between plain values and config dataclasses, with every key and type checked."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from pipeline.errors import ConfigError

T = TypeVar("T")


def from_dict(cls: type[T], tree: Mapping[str, Any], path: str = "") -> T:
    """An instance of a config dataclass from plain values. path: prefix of the keys in messages. Raises ConfigError for
    an unknown key, a missing one or a wrong type, but does not check bounds (see config/check/)."""
    hints = get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in tree:
        if key not in fields:
            known = [f"{path}{name}" for name, _ in flat_types(cls)]
            raise ConfigError(unknown_key(f"{path}{key}", known))
    values = {}
    for name, field in fields.items():
        if name in tree:
            values[name] = _convert(hints[name], tree[name], f"{path}{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{path}{name} is missing: give {path}{name}=...")
    return cls(**values)


def _convert(kind: Any, value: Any, where: str) -> Any:
    """`value` as the type `kind`, without guessing: 1e6 may become an int, "3" may not. where: the key in messages."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        alternatives = [kind for kind in arguments if kind is not type(None)]
        lists = [kind for kind in alternatives if get_origin(kind) is tuple]
        return _convert(lists[0] if lists and isinstance(value, list | tuple) else alternatives[0], value, where)
    if origin is Literal:
        if value in arguments and type(value) in {type(choice) for choice in arguments}:
            return value
        raise ConfigError(f"{where}={_show(value)}: there are {', '.join(map(str, arguments))}")
    if origin is tuple:
        return _convert_tuple(arguments, value, where)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}={_show(value)}: not a group of keys")
        return from_dict(kind, value, f"{where}.")
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is bool and isinstance(value, bool):
        return value
    if kind is int and is_number and math.isfinite(value) and value == int(value):
        return int(value)
    if kind is float and is_number and math.isfinite(value):
        return float(value)
    if kind is str and isinstance(value, str):
        return value
    expected = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]
    raise ConfigError(f"{where}={_show(value)}: {expected} is wanted")


def _convert_tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    """A list as a tuple; a single value counts as a list of one."""
    items = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if arguments[-1] is Ellipsis:
        return tuple(_convert(arguments[0], item, where) for item in items)
    if len(items) != len(arguments):
        raise ConfigError(f"{where}={_show(value)}: {len(arguments)} values are wanted, as [a,b]")
    return tuple(_convert(kind, item, where) for kind, item in zip(arguments, items))


def _show(value: Any) -> str:
    """A value as a user would type it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def flat_types(cls: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, type without bounds) of every field, including the groups themselves."""
    for name, kind in get_type_hints(cls).items():
        yield f"{path}{name}", kind
        inner = next((kind for kind in (kind, *get_args(kind)) if dataclasses.is_dataclass(kind)), None)
        if inner is not None:
            yield from flat_types(inner, f"{path}{name}.")


def unknown_key(key: str, known: Sequence[str]) -> str:
    """The line that refuses an unknown key: it names the nearest known key and the other keys of that group."""
    last = key.rpartition(".")[2]
    same_name = [name for name in known if name.rpartition(".")[2] == last]
    near = same_name or difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    near = near or [name for name in known if difflib.get_close_matches(last, [name.rpartition(".")[2]], cutoff=0.7)]
    group = (near[0] if near else key).rpartition(".")[0]
    neighbours = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == group]
    if not neighbours:
        group, neighbours = "", [name for name in known if "." not in name]
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{key}: no such key{hint} (keys{f' of {group}' if group else ''}: {', '.join(dict.fromkeys(neighbours))})"


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain values, with lists for tuples, as from_dict takes them and JSON and YAML store them."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, tuple | list) else value

    return plain(dataclasses.asdict(config))


def to_yaml(config: Any) -> str:
    """The whole configuration as YAML; `from_dict(cls, yaml.safe_load(text))` gives it back."""
    import yaml

    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True, width=120)
