"""Plain values from JSON and YAML that nobody vouches for.

Both readers are bounded in size and depth and give only null, booleans, integers of 64 bits, finite numbers, text,
lists and dictionaries. Whatever else a text holds is a ParseError.
"""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from pipeline.errors import ParseError

JSON_BYTES = 1 << 30
"""Largest JSON text: a manifest of a million shards takes about 300 MB."""
YAML_BYTES = 1 << 20
"""Largest YAML text."""
DEPTH = 64
"""Deepest nesting of lists and dictionaries."""
DIGITS = 20
"""Longest integer that is converted, so that a number of a million digits costs nothing."""
TAGS = frozenset(f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "map", "seq"))


def parse_json(data: bytes | bytearray | memoryview | str, limit: int = JSON_BYTES) -> Any:
    """The value of a JSON text in UTF-8.

    limit: largest text in bytes. Raises ParseError for what is no JSON, nests deeper than DEPTH, names a key twice, or
    holds NaN, infinity, an integer beyond 64 bits or half of a surrogate pair.
    """
    if len(data) > limit:
        raise ParseError(f"it has {len(data)} bytes, {limit} at most are read")
    try:
        text = data if isinstance(data, str) else str(data, "utf-8")
        value = _DECODER.decode(text)
    except RecursionError:
        raise ParseError(f"it nests deeper than {DEPTH} levels") from None
    except UnicodeDecodeError:
        raise ParseError("it is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ParseError(f"it is not JSON ({error.msg} at character {error.pos})") from None
    if "\\u" in text or isinstance(data, str) or text.count("[") + text.count("{") > DEPTH:
        _check_tree(value)
    return value


def parse_yaml(data: bytes | str, limit: int = YAML_BYTES) -> Any:
    """The value of a YAML document in UTF-8.

    limit: largest text in bytes. Raises ParseError for what is no YAML or several documents, nests deeper than DEPTH,
    or holds tags, anchors, aliases, dates, NaN, infinity or an integer beyond 64 bits.
    """
    import yaml

    if len(data) > limit:
        raise ParseError(f"it has {len(data)} bytes, {limit} at most are read")
    try:
        text = data if isinstance(data, str) else str(data, "utf-8")
        _check_events(text)
        return _check_yaml(yaml.load(text, Loader=_loader()))
    except RecursionError:
        raise ParseError(f"it nests deeper than {DEPTH} levels") from None
    except UnicodeDecodeError:
        raise ParseError("it is not UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or type(error).__name__
        raise ParseError(f"it is not YAML ({problem}{f', line {mark.line + 1}' if mark else ''})") from None
    except ParseError:
        raise
    except (ValueError, OverflowError, TypeError) as error:  # a scalar that its constructor cannot convert
        raise ParseError(f"it holds a value that cannot be read ({str(error)[:80]})") from None


# --------------------------------------------------------------------------------------------------------------------
# JSON


def _integer(digits: str) -> int:
    if len(digits) > DIGITS or not -(2**63) <= (value := int(digits)) < 2**64:
        raise ParseError(f"it holds an integer of {len(digits)} digits; 64 bits are read")
    return value


def _number(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ParseError("it holds a number beyond the range of float64")
    return value


def _constant(name: str) -> NoReturn:
    raise ParseError(f"it holds {name}, which is no number of JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names: set[str] = set()
        repeated = next(name for name, _ in pairs if name in names or names.add(name))  # type: ignore[func-returns-value]
        raise ParseError(f"it names the key {repeated[:60]!r} twice")
    return value


_DECODER = json.JSONDecoder(
    parse_int=_integer, parse_float=_number, parse_constant=_constant, object_pairs_hook=_object
)


def _check_tree(value: Any) -> None:
    """Raise ParseError where `value` nests deeper than DEPTH, or holds text that is no Unicode text."""
    level = [value]
    for _ in range(DEPTH + 1):
        deeper: list[Any] = []
        for item in level:
            if isinstance(item, str):
                _check_text(item)
            elif isinstance(item, dict):
                deeper.extend(item)
                deeper.extend(item.values())
            elif isinstance(item, list):
                deeper.extend(item)
        if not deeper:
            return
        level = deeper
    raise ParseError(f"it nests deeper than {DEPTH} levels")


def _check_text(text: str) -> None:
    """Raise ParseError for a lone surrogate, which cannot be stored again."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ParseError("it holds half of a surrogate pair, which is no Unicode text") from None


# --------------------------------------------------------------------------------------------------------------------
# YAML


def _check_events(text: str) -> None:
    """Raise ParseError for aliases, anchors, tags and depth, before anything is built of them."""
    import yaml

    depth = 0
    for event in yaml.parse(text, Loader=_loader()):
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise ParseError(f"line {event.start_mark.line + 1} holds an anchor or an alias, which are not read")
        tag = getattr(event, "tag", None)
        if tag not in (None, "!") and tag not in TAGS:
            raise ParseError(f"line {event.start_mark.line + 1} holds the tag {tag[:60]!r}, which is not read")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > DEPTH:
                raise ParseError(f"it nests deeper than {DEPTH} levels")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _loader() -> Any:
    """PyYAML's safe loader, the one in C where there is one."""
    import yaml

    return getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _check_yaml(value: Any) -> Any:
    """`value` if it is made of plain values alone. Raises ParseError."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str | int | float | bool | None):
                raise ParseError(f"it holds a key of type {type(key).__name__}")
            _check_yaml(key)
            _check_yaml(item)
    elif isinstance(value, list):
        for item in value:
            _check_yaml(item)
    elif isinstance(value, str):
        _check_text(value)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ParseError(f"it holds {value}, which is no finite number")
    elif isinstance(value, int):
        if not -(2**63) <= value < 2**64:
            raise ParseError("it holds an integer beyond 64 bits")
    elif value is not None:
        raise ParseError(f"it holds a {type(value).__name__}, which is not read")
    return value
