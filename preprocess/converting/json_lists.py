"""The lists of a large JSON object, element by element: COCO's files have up to a gigabyte, most of it outlines.

Memory is that of one element and of PIECE characters. Everything is checked as JSON, but for numbers beyond float64,
which become infinite: who uses a number looks at it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterator
from typing import Any, NoReturn, TextIO

from pipeline.errors import ParseError

PIECE = 1 << 20
"""Characters that are read at a time."""
LONGEST = 1 << 26
"""Characters of one element."""
WHITE = re.compile(r"[ \t\r\n]*")


class JsonLists:
    """A JSON object of lists. seen: names of its values so far."""

    def __init__(self, text: TextIO, names: Container[str]) -> None:
        """names: the lists that are wanted."""
        self.seen: set[str] = set()
        self._text, self._names = text, names
        self._buffer, self._at, self._before = "", 0, 0
        self._ended = False

    def items(self) -> Iterator[tuple[str, Any]]:
        """Yields (name, element) of the lists that are wanted, in the order of the text. Raises ParseError for what is
        no JSON object in UTF-8, names a value twice, or has something else than a list under a name that is wanted."""
        if self._next() != "{":
            raise ParseError("it is no JSON object")
        self._at += 1
        if self._next() == "}":
            self._at += 1
        else:
            while True:
                yield from self._named()
                if self._closes("}"):
                    break
        if self._next():
            self._wrong("something follows its end")

    def _named(self) -> Iterator[tuple[str, Any]]:
        """One name and the elements of its value."""
        name = self._value() if self._next() == '"' else None
        if not isinstance(name, str):
            self._wrong("a name is wanted")
        if name in self.seen:
            raise ParseError(f"it names {name[:60]!r} twice")
        self.seen.add(name)
        if self._next() != ":":
            self._wrong("a colon is wanted")
        self._at += 1
        wanted = name in self._names
        if self._next() != "[":
            if wanted:
                raise ParseError(f"its {name!r} is no list")
            self._value()
            return
        self._at += 1
        if self._next() == "]":
            self._at += 1
            return
        while True:
            element = self._value()
            if wanted:
                yield name, element
            if self._closes("]"):
                return

    def _closes(self, end: str) -> bool:
        """Passes over a comma or `end`. Returns whether it was the latter."""
        found = self._next()
        if found != end and found != ",":
            self._wrong(f"a comma or {end} is wanted")
        self._at += 1
        return found == end

    def _next(self) -> str:
        """The next character that is no white space, "" at the end."""
        while True:
            self._at = WHITE.match(self._buffer, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._buffer):
                return self._buffer[self._at]
            if self._ended:
                return ""
            self._read(PIECE)

    def _value(self) -> Any:
        """The next value, as a whole."""
        self._next()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._buffer, self._at)
            except json.JSONDecodeError as error:
                if self._ended or len(self._buffer) - self._at > LONGEST:
                    at = self._before + error.pos
                    raise ParseError(f"it is cut, or no JSON ({error.msg} at character {at})") from None
            except RecursionError:
                raise ParseError("it nests too deeply") from None
            except ParseError:
                raise
            except ValueError as error:  # an integer of thousands of digits
                raise ParseError(f"it holds a number that cannot be read ({str(error)[:80]})") from None
            else:
                if self._ended or (end < len(self._buffer) and not self._goes_on(value, end)):
                    self._at = end
                    return value
            self._read(max(PIECE, len(self._buffer) - self._at))

    def _goes_on(self, value: Any, end: int) -> bool:
        """Whether a number was read whose fraction or exponent is cut by the end of the buffer: "1." or "1e+"."""
        rest = self._buffer[end : end + len("e+") + 1]
        return type(value) in (int, float) and len(rest) <= len("e+") and rest[0] in ".eE"

    def _read(self, many: int) -> None:
        """Reads `many` characters more, and forgets those that are done with."""
        more = self._text.read(many)
        self._ended = not more
        self._before += self._at
        self._buffer, self._at = self._buffer[self._at :] + more, 0

    def _wrong(self, what: str) -> NoReturn:
        raise ParseError(f"it is cut, or no JSON ({what} at character {self._before + self._at})")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ParseError(f"it names {twice[:60]!r} twice in one object")
    return value


def _constant(name: str) -> NoReturn:
    raise ParseError(f"it holds {name}, which is no number of JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)
