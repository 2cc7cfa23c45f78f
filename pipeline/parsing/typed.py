"""Dataclasses from plain values that nobody vouches for, with every type and bound checked.

    class Entry:
        name: str
        samples: Annotated[int, Ge(0)]      # anything with .admits(value) and .words

    build(Entry, parse_json(data))          # ParseError: "samples=-5: 0 or more is wanted"

Nothing is converted but lists to tuples; a whole number stays one where a float is wanted, so that what is stored again
has the bytes that were read. `True` is no number.
"""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Callable, Mapping
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from pipeline.errors import ParseError

T = TypeVar("T")
Reader = Callable[[Any], Any]
LARGEST = sys.float_info.max
SHOWN = 60
"""Characters of a wrong value that a message shows."""


class _Wrong(Exception):
    """A value of a wrong type; `place` is built on the way out: "shards", "[3]", ".samples"."""

    def __init__(self, value: Any, wanted: str, place: str = "", text: str = "") -> None:
        self.value, self.wanted, self.place, self.text = value, wanted, place, text


def build(cls: type[T], value: Any, *, unknown: Literal["refuse", "pass"] = "refuse") -> T:
    """An instance of the dataclass `cls` from plain values; fields with a default may be missing.

    unknown: whether fields that `cls` lacks, at any depth, are refused or passed over (formats that grow). Raises
    ParseError, which names the place of the first value that is missing, unknown or wrong.
    """
    try:
        return _reader(cls, unknown == "pass")(value)  # type: ignore[arg-type]
    except _Wrong as wrong:
        place = wrong.place.removeprefix(".")
        if wrong.text:
            raise ParseError(wrong.text.format(place=f"{place}." if place else "", at=place or "it")) from None
        raise ParseError(f"{place or 'it'}={_shown(wrong.value)}: {wrong.wanted}") from None


@cache
def _reader(kind: Any, forward: bool) -> Reader:
    """The function that checks and returns a value of type `kind`."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return _same
    if origin is Annotated:
        return _bounded(_reader(arguments[0], forward), [b for b in arguments[1:] if hasattr(b, "admits")])
    if origin in (Union, types.UnionType):
        return _alternatives([(k, _reader(k, forward)) for k in arguments])
    if origin is Literal:
        return _choice(arguments)
    if origin is tuple:
        return _tuple(arguments, forward)
    if kind is list or origin is list:
        return _list(_reader(arguments[0], forward) if arguments else _same)
    if kind is dict or origin in (dict, Mapping):
        return _dictionary(_reader(arguments[1], forward) if arguments else _same)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _dataclass(kind, forward)
    return _SCALARS[kind]


def _same(value: Any) -> Any:
    return value


def _text(value: Any) -> str:
    if type(value) is not str:
        raise _Wrong(value, "text is wanted")
    return value


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise _Wrong(value, "a whole number is wanted")
    return value


def _real(value: Any) -> float:
    if type(value) not in (int, float) or not -LARGEST <= value <= LARGEST:
        raise _Wrong(value, "a finite number is wanted")
    return value


def _truth(value: Any) -> bool:
    if type(value) is not bool:
        raise _Wrong(value, "true or false is wanted")
    return value


def _nothing(value: Any) -> None:
    if value is not None:
        raise _Wrong(value, "null is wanted")


_SCALARS: dict[Any, Reader] = {
    str: _text,
    int: _whole,
    float: _real,
    bool: _truth,
    type(None): _nothing,
    None: _nothing,
}


def _bounded(inner: Reader, bounds: list[Any]) -> Reader:
    def read(value: Any) -> Any:
        result = inner(value)
        for bound in bounds:
            if not bound.admits(result):
                raise _Wrong(value, bound.words)
        return result

    return read


def _alternatives(readers: list[tuple[Any, Reader]]) -> Reader:
    optional = [reader for kind, reader in readers if kind is not type(None)]
    null = len(optional) < len(readers)

    def read(value: Any) -> Any:
        if value is None and null:
            return None
        for number, reader in enumerate(optional):
            try:
                return reader(value)
            except _Wrong:
                if number == len(optional) - 1:
                    raise
        raise AssertionError("a union has an alternative")

    return read


def _choice(choices: tuple[Any, ...]) -> Reader:
    def read(value: Any) -> Any:
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            raise _Wrong(value, f"one of {', '.join(map(str, choices))} is wanted")
        return value

    return read


def _items(value: Any, readers: list[Reader] | Reader) -> list[Any]:
    result = []
    for number, item in enumerate(value):
        try:
            result.append((readers[number] if isinstance(readers, list) else readers)(item))
        except _Wrong as wrong:
            wrong.place = f"[{number}]{wrong.place}"
            raise
    return result


def _tuple(arguments: tuple[Any, ...], forward: bool) -> Reader:
    one = _reader(arguments[0], forward) if arguments[-1] is Ellipsis else None
    several = None if one else [_reader(kind, forward) for kind in arguments]

    def read(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple):
            raise _Wrong(value, "a list is wanted")
        if several is not None and len(value) != len(several):
            raise _Wrong(value, f"a list of {len(several)} is wanted")
        return tuple(_items(value, one or several or []))

    return read


def _list(reader: Reader) -> Reader:
    def read(value: Any) -> list[Any]:
        if not isinstance(value, list | tuple):
            raise _Wrong(value, "a list is wanted")
        return _items(value, reader)

    return read


def _dictionary(reader: Reader) -> Reader:
    def read(value: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise _Wrong(value, "a group of keys is wanted")
        result = {}
        for name, item in value.items():
            try:
                result[_text(name)] = reader(item)
            except _Wrong as wrong:
                wrong.place = f".{name}{wrong.place}"
                raise
        return result

    return read


def _dataclass(cls: type, forward: bool) -> Reader:
    hints = get_type_hints(cls, include_extras=True)
    readers = {field.name: _reader(hints[field.name], forward) for field in dataclasses.fields(cls) if field.init}
    required = [
        field.name
        for field in dataclasses.fields(cls)
        if field.init and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]

    def read(value: Any) -> Any:
        if type(value) is not dict:
            raise _Wrong(value, "a group of keys is wanted")
        missing = [name for name in required if name not in value]
        strange = [] if forward else [name for name in value if name not in readers]
        if missing or strange:
            names = ", ".join(f"{{place}}{_plain(name)}" for name in [*missing, *strange][:5])
            raise _Wrong(value, "", text=f"{names}: {'missing' if missing else 'no such field is known'}")
        fields = {}
        for name, reader in readers.items():
            if name in value:
                try:
                    fields[name] = reader(value[name])
                except _Wrong as wrong:
                    wrong.place = f".{name}{wrong.place}"
                    raise
        return cls(**fields)

    return read


def _plain(name: Any) -> str:
    """A name for the format string of a message."""
    return _shown(name).replace("{", "{{").replace("}", "}}")


def _shown(value: Any) -> str:
    """A value for a message, cut where it is long."""
    if isinstance(value, Mapping | list | tuple):
        return (
            f"<{len(value)} values>" if len(value) > 4 or any(isinstance(v, list | dict) for v in value) else str(value)
        )
    if isinstance(value, int) and abs(value) >= 10**SHOWN:
        return f"a number of {value.bit_length()} bits"
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
