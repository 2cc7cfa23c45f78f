"""What a value of a stored format may be, declared beside the field as `Annotated[int, Whole(0, 10)]`.

`pipeline.parsing.typed.build` refuses what a bound does not admit, in its words.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any

MOST_SAMPLES = 2**31 - 1
"""Records of one tar, and samples of one input shard: a row is an int32 in the list of excluded records."""
MOST_BYTES = 2**44
"""Bytes of one tar."""
MOST_SIDE = 1 << 16
"""Pixels or positions along a side, and tokens or values of a text state."""
MOST_ELEMENTS = 2**28
"""Elements of one array of a record."""
MOST_UNITS = 10**8
"""Input shards and tars of a dataset."""
LONGEST_NAME, LONGEST_PATTERN = 4096, 1 << 20
"""Characters of a key or path, and of a source pattern, whose braces may name thousands of them."""
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
TAR_NAME = re.compile("(?:(?!\\.{1,2}/)[^/\x00-\x1f\x7f-\x9f]+/)*[^/\x00-\x1f\x7f-\x9f]+\\.tar")
SHA256 = re.compile("[0-9a-f]{64}")


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


Digest = Annotated[str, Text(SHA256, "a SHA-256 of 64 hexadecimal digits", 64)]
MaybeDigest = Annotated[str, Text(re.compile("(?:[0-9a-f]{64})?"), 'a SHA-256 of 64 hexadecimal digits or ""', 64)]
Name = Annotated[str, Text(re.compile("[^\0]+"), f"text of 1 to {LONGEST_NAME} characters without zeros")]
Pattern = Annotated[str, Text(re.compile("[^\0]+"), "a pattern", LONGEST_PATTERN)]
TarName = Annotated[str, Text(TAR_NAME, "the key of a .tar below the dataset, without control characters,")]
Samples = Annotated[int, Whole(0, MOST_SAMPLES)]
Bytes = Annotated[int, Whole(0, MOST_BYTES)]
Side = Annotated[int, Whole(1, MOST_SIDE)]
Channels = Annotated[int, Whole(1, 4096)]
Shift = Annotated[float, Real(-1e6, 1e6)]
Scale = Annotated[float, Real(1e-6, 1e6)]
