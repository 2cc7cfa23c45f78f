"""What a value that was read may be, declared beside a field as `Annotated[int, Whole(0, 10)]`.

`pipeline.parsing.typed.build` refuses what a bound does not admit, in its words.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

LONGEST_NAME = 4096
"""Characters of a key or path."""


@dataclass(frozen=True)
class Whole:
    """A whole number from `low` to `high`."""

    low: int
    high: int

    def admits(self, value: int) -> bool:
        return self.low <= value <= self.high

    @property
    def words(self) -> str:
        return f"a whole number from {self.low} to {self.high} is wanted"


@dataclass(frozen=True)
class Real:
    """A number from `low` to `high`."""

    low: float
    high: float

    def admits(self, value: float) -> bool:
        return self.low <= value <= self.high

    @property
    def words(self) -> str:
        return f"a number from {self.low:g} to {self.high:g} is wanted"


@dataclass(frozen=True)
class Text:
    """Text that a pattern matches as a whole, of at most `most` characters. wanted: what it is, in words."""

    pattern: re.Pattern[str]
    wanted: str
    most: int = LONGEST_NAME

    def admits(self, value: str) -> bool:
        return len(value) <= self.most and self.pattern.fullmatch(value) is not None

    @property
    def words(self) -> str:
        return f"{self.wanted} is wanted"


@dataclass(frozen=True)
class Several:
    """A list of `low` to `high` items, all different where `different` says so."""

    low: int
    high: int
    different: bool = False

    def admits(self, value: Any) -> bool:
        return self.low <= len(value) <= self.high and not (self.different and len(set(value)) < len(value))

    @property
    def words(self) -> str:
        return f"{self.low} to {self.high}{' different' if self.different else ''} values are wanted"
