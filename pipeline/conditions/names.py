"""Names of classes and labels: read from a file, and turned into numbers."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from pipeline.conditions.facts import MOST_CLASSES
from pipeline.errors import ConfigError, ParseError
from pipeline.parsing.text import one_line
from pipeline.parsing.values import parse_json

MOST_BYTES = 64 * 1024 * 1024
LONGEST = 256
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
BYTE_ORDER_MARK = "\ufeff"
NUMBER = re.compile("[0-9]{1,9}")
SHOWN, LOOKED_AT = 3, 20_000
"""Similar names that a message offers; of the first so many."""
LONGEST_SHOWN = 80
"""Characters of a word that a message shows."""


def read_names(data: bytes, where: str = "the file of names") -> tuple[str, ...]:
    """Names in the order of their numbers, from the bytes of a file.

    where: its path or URL, for messages; its ending tells the format, else the first character. .txt: a name in each
    line. .json: a list of names, or an object of names by number, {"0": name}. Raises ConfigError.
    """
    try:
        if len(data) > MOST_BYTES:
            raise ParseError(f"it has {len(data)} bytes, {MOST_BYTES} at most are read")
        is_json = where.endswith(".json") or (not where.endswith(".txt") and data.lstrip()[:1] in (b"[", b"{"))
        names = _of_json(parse_json(data.removeprefix(BYTE_ORDER_MARK.encode()))) if is_json else _of_lines(data)
        if not 1 <= len(names) <= MOST_CLASSES:
            raise ParseError(f"it holds {len(names)} names, 1 to {MOST_CLASSES} are wanted")
        for number, name in enumerate(names):
            if not name or len(name) > LONGEST or CONTROL.search(name):
                raise ParseError(f"its name {number} is {name!r:.80}: 1 to {LONGEST} characters in one line are wanted")
    except ParseError as error:
        raise ConfigError(
            one_line(f"{where}: {error} (names are a line each in a .txt, or a list or {{number: name}} in a .json)")
        ) from None
    return names


def _of_lines(data: bytes) -> tuple[str, ...]:
    try:
        text = data.decode("utf-8").removeprefix(BYTE_ORDER_MARK)
    except UnicodeDecodeError:
        raise ParseError("it is not UTF-8") from None
    return tuple(line.strip() for line in text.rstrip().split("\n")) if text.strip() else ()


def _of_json(value: Any) -> tuple[str, ...]:
    if isinstance(value, dict):
        missing = [number for number in range(len(value)) if str(number) not in value]
        if missing:
            raise ParseError(f"it has no name {missing[0]}: the numbers 0 to {len(value) - 1} are wanted")
        value = [value[str(number)] for number in range(len(value))]
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ParseError("it is neither a list of names nor an object of names by number")
    return tuple(name.strip() for name in value)


@lru_cache(maxsize=16)
def numbers_of(names: tuple[str, ...]) -> Mapping[str, tuple[int, ...]]:
    """The numbers that have each name: several where names repeat, as "crane" does in ImageNet."""
    numbers: dict[str, tuple[int, ...]] = {}
    for number, name in enumerate(names):
        numbers[name] = (*numbers.get(name, ()), number)
    return numbers


def number_of(word: str | int, names: tuple[str, ...], count: int, what: str = "class") -> int:
    """The number of a class, given by number or by name.

    names: all names in order, or () where they are not known. count: number of classes. what: "class" or "label". A
    name is looked up first, so a class that is called "7" is found by it. Raises ConfigError.
    """
    shown = _short(word)
    if isinstance(word, str):
        found = numbers_of(names).get(word.strip(), ())
        if len(found) > 1:
            numbers = ", ".join(map(str, found))
            raise ConfigError(one_line(f"{what} {shown}: {len(found)} have this name, give one of {numbers}"))
        if found:
            return found[0]
        if NUMBER.fullmatch(word.strip()):
            word = int(word)
    if isinstance(word, bool) or not isinstance(word, int):
        near = difflib.get_close_matches(shown, names[:LOOKED_AT], n=SHOWN, cutoff=0.5)
        if not names:
            hint = f"the model knows no names of its {count}, give a number from 0 to {count - 1}"
        elif near:
            hint = f"there is no such name, did you mean {' or '.join(near)}?"
        else:
            hint = f"there is no such name, give one such as {names[0]}, or a number from 0 to {count - 1}"
        raise ConfigError(one_line(f"{what} {shown}: {hint}"))
    if not 0 <= word < count:
        raise ConfigError(f"{what} {shown}: a number from 0 to {count - 1} is wanted")
    return word


def _short(word: str | int) -> str:
    """A word for a message, cut where it is long."""
    if isinstance(word, int) and abs(word) >= 10**20:
        return f"of {word.bit_length()} bits"
    return str(word).strip()[:LONGEST_SHOWN]
