"""Conversion between plain values and config dataclasses, with every key and type checked.

from_dict(cls, tree)                 from plain values (stored.py: from what is stored)
to_dict(config)                      to plain values, for this process
to_stored(config), to_yaml(config)   for what is stored or sent: references in place of the environment's values
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import reprlib
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from pipeline.config.loading.references import Lacking, Resolved, lacking, references_of, typed
from pipeline.config.values.hints import hints_of
from pipeline.config.values.keys import key_of
from pipeline.errors import ConfigError
from pipeline.parsing.redaction import redact_values

T = TypeVar("T")
LARGEST = 2**63
"""Whole numbers are smaller in size than this one, as files and arrays hold them."""


def from_dict(cls: type[T], tree: Mapping[str, Any], path: str = "") -> T:
    """An instance of a config dataclass from plain values. path: prefix of the keys in messages. Raises ConfigError for
    an unknown key, a missing one or a wrong type, but does not check bounds (see config/check/)."""
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{path.rstrip('.') or 'the configuration'}={_show(tree)}: not a group of keys")
    base, cls = cls, kind_of(cls, tree, path)
    hints = hints_of(cls)
    fields = {key_of(field.name): field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in tree:
        if key not in fields:
            raise ConfigError(_unknown(base, cls, key, path))
    values: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for name, field in fields.items():
        value = tree.get(name)
        if isinstance(value, Lacking):
            missing[name] = f"{value.where}{path}{name}={value.reference}: {value.why}"
            values[field.name] = None
        elif name in tree:
            values[field.name] = _convert(hints[field.name], value, f"{path}{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{path}{name} is missing: give {path}{name}=...")
    config = cls(**values)
    if missing:
        lacking(config, missing)
    return config


def to_stored(config: Any) -> dict[str, Any]:
    """A configuration as plain values that may be stored and sent: what came from the environment is a reference to
    it, and URLs have no user, password or signature."""
    return redact_values(plain_of(config, references_of(config)), references=False)


def to_yaml(config: Any) -> str:
    """The whole configuration as YAML, as `to_stored` gives it; `from_stored(cls, parse_yaml(text))` (stored.py)
    reads it."""
    import yaml

    return yaml.safe_dump(to_stored(config), sort_keys=False, allow_unicode=True, width=120)


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain values, with lists for tuples, as from_dict takes them. Not to be stored."""
    return plain_of(config, {})


# --------------------------------------------------------------------------------------------------------------------
# Dataclasses of which a group has one of several, by its name


def kinds_of(cls: Any) -> dict[str, Any]:
    """The dataclasses of which a group of type `cls` has one, by the `name` that chooses it: what its `kinds` gives,
    or itself alone under ""."""
    several = isinstance(vars(cls).get("kinds"), classmethod)  # a field may have that name
    return cls.kinds() if several else {"": cls}


def kind_of(cls: Any, tree: Mapping[str, Any], path: str) -> Any:
    """The dataclass that the `name` of a group chooses. Raises ConfigError for a name that chooses none."""
    kinds = kinds_of(cls)
    if "" in kinds:
        return cls
    name = tree.get("name", next(field.default for field in dataclasses.fields(cls) if field.name == "name"))
    if isinstance(name, Resolved):
        name = name.text
    if not isinstance(name, str) or name not in kinds:
        raise ConfigError(f"{path}name={_show(name)}: there are {', '.join(kinds)}")
    return kinds[name]


def _unknown(base: Any, cls: Any, key: Any, path: str) -> str:
    """The line that refuses a key of a group: one that another kind of it has, or none has."""
    others = [
        name for name, kind in kinds_of(base).items() if key in {field.name for field in dataclasses.fields(kind)}
    ]
    if base is not cls and others:
        group = path.rstrip(".")
        mine = next(name for name, kind in kinds_of(base).items() if kind is cls)
        return f"{path}{_show(key)}: {group}={mine} has no such key ({group}={', '.join(others)} has)"
    return unknown_key(f"{path}{_show(key)}", [f"{path}{name}" for name, _ in flat_types(cls)])


# --------------------------------------------------------------------------------------------------------------------
# From plain values


def _convert(kind: Any, value: Any, where: str) -> Any:
    """`value` as the type `kind`, without guessing: 1e6 may become an int, "3" may not. where: the key in messages."""
    if isinstance(value, Resolved):
        return _convert_resolved(kind, value, where)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        alternatives = [kind for kind in arguments if kind is not type(None)]
        lists = [kind for kind in alternatives if get_origin(kind) is tuple]
        return _convert(lists[0] if lists and isinstance(value, list | tuple) else alternatives[0], value, where)
    if origin is Literal:
        if any(type(value) is type(choice) and value == choice for choice in arguments):
            return value
        raise ConfigError(f"{where}={_show(value)}: {_wanted(kind)}")
    if origin is tuple:
        return _convert_tuple(arguments, value, where)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}={_show(value)}: not a group of keys")
        return from_dict(kind, value, f"{where}.")
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _MOST
    if kind is bool and isinstance(value, bool):
        return value
    if kind is int and is_number and math.isfinite(value) and value == int(value) and -LARGEST <= value < LARGEST:
        return int(value)
    if kind is float and is_number and math.isfinite(value):
        return float(value)
    if kind is str and _is_text(value):
        return value
    raise ConfigError(f"{where}={_show(value)}: {_wanted(kind)}")


_MOST = 1.7976931348623157e308
"""The largest float64; a comparison with it takes integers of any length."""


def _is_text(value: Any) -> bool:
    """Whether a value is text that can be stored: without NUL and without halves of surrogate pairs."""
    return isinstance(value, str) and re.search("[\0\ud800-\udfff]", value) is None


def _convert_resolved(kind: Any, value: Resolved, where: str) -> Any:
    """What a reference has become, as the type `kind`. A refusal shows the reference."""
    plain: Any = value.text
    texts = [k for k in (kind, *get_args(kind)) if k is str or (get_origin(k) is Literal and plain in get_args(k))]
    if not texts:
        plain = typed(value.text)
    elif get_origin(kind) is tuple and plain is not None:
        plain = typed(plain) if plain.startswith("[") else [plain]
        plain = [str(item) for item in plain]
    try:
        return _convert(kind, plain, where)
    except ConfigError:
        raise ConfigError(f"{where}={value.reference}: {_wanted(kind)}") from None


def _wanted(kind: Any) -> str:
    """What a value of a type should be, in words."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return f"there are {', '.join(map(str, arguments))}"
    if origin in (Union, types.UnionType):
        return " or ".join(_wanted(kind) for kind in arguments if kind is not type(None))
    if origin is tuple:
        return f"a list is wanted, and in it: {_wanted(arguments[0])}"
    if dataclasses.is_dataclass(kind):
        return "not a group of keys"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text (UTF-8)"}
    return f"{words[kind]} is wanted"


def _convert_tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    """A list as a tuple; a single value counts as a list of one."""
    items = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if arguments[-1] is Ellipsis:
        return tuple(_convert(arguments[0], item, where) for item in items)
    if len(items) != len(arguments):
        raise ConfigError(f"{where}={_show(value)}: {len(arguments)} values are wanted, as [a,b]")
    return tuple(_convert(kind, item, where) for kind, item in zip(arguments, items))


# --------------------------------------------------------------------------------------------------------------------
# To plain values


def plain_of(value: Any, references: Mapping[str, Any], path: str = "") -> Any:
    """Plain values of a configuration. references: what stands in place of values, by dotted key."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        keys = {field.name: f"{path}{key_of(field.name)}" for field in dataclasses.fields(value)}
        return {
            key_of(name): plain_of(references[key], {})
            if key in references
            else plain_of(getattr(value, name), references, f"{key}.")
            for name, key in keys.items()
        }
    if isinstance(value, Mapping):
        return {key: plain_of(item, {}) for key, item in value.items()}
    return [plain_of(item, {}) for item in value] if isinstance(value, tuple | list) else value


# --------------------------------------------------------------------------------------------------------------------
# Messages


def _show(value: Any) -> str:
    """A value as a user would type it, cut where it is long."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and abs(value) >= 10**40:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, Resolved):
        return value.reference
    if isinstance(value, str | int | float):
        return text if len(text := str(value)) <= 200 else f"{text[:200]}..."
    return _BRIEF.repr(value)


_BRIEF = reprlib.Repr()
_BRIEF.maxlevel, _BRIEF.maxlist, _BRIEF.maxdict, _BRIEF.maxstring = 2, 8, 4, 40


def flat_types(cls: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, type without bounds) of every field, including the groups themselves, and the keys of every kind
    that a group may be."""
    hints = {name: kind for one in kinds_of(cls).values() for name, kind in hints_of(one).items()}
    for field, kind in hints.items():
        name = key_of(field)
        yield f"{path}{name}", kind
        inner = next((kind for kind in (kind, *get_args(kind)) if dataclasses.is_dataclass(kind)), None)
        if inner is not None:
            yield from flat_types(inner, f"{path}{name}.")


def unknown_key(key: str, known: Sequence[str]) -> str:
    """The line that refuses an unknown key: it names the nearest known key and the other keys of that group."""
    key = key if len(key) <= 100 else f"{key[:100]}..."
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
