"""The header of a .npy file that nobody vouches for, read without evaluating it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pipeline.errors import ParseError

MAGIC = b"\x93NUMPY"
HEADER_BYTES = 10_000
"""Longest header."""
DIMENSIONS, ELEMENTS = 32, 2**53
"""Most dimensions, and most elements of an array."""
FIELD = re.compile(
    r"\s*'(descr|fortran_order|shape)'\s*:\s*('[<>|=]?[a-zA-Z]\d{0,4}'|True|False|\([\dL, ]*\))\s*(?:,|(?=\}))"
)


@dataclass(frozen=True)
class NpyHeader:
    """What a .npy header says. dtype: numpy's name, such as "<f2". start: offset of the data in bytes."""

    dtype: str
    shape: tuple[int, ...]
    fortran: bool
    start: int

    @property
    def elements(self) -> int:
        """Number of elements, at most ELEMENTS."""
        count = 1
        for side in self.shape:
            count *= side
        return count


def parse_npy_header(data: bytes | memoryview) -> NpyHeader:
    """The header of a .npy file of version 1, 2 or 3.

    data: the file, or its first bytes. Raises ParseError for a damaged header, an array of objects or of records, and
    for a shape beyond DIMENSIONS or ELEMENTS.
    """
    head = bytes(data[:12])
    if head[:6] != MAGIC or len(head) < 12 or head[6] not in (1, 2, 3) or head[7] != 0:
        raise ParseError("it is not a .npy file")
    width = 2 if head[6] == 1 else 4
    length = int.from_bytes(head[8 : 8 + width], "little")
    start = 8 + width + length
    if length > HEADER_BYTES or len(data) < start:
        raise ParseError("its .npy header is longer than the file, or than a header can be")
    text = bytes(data[8 + width : start]).decode("latin-1").strip()
    fields: dict[str, str] = {}
    at = 1
    while match := FIELD.match(text, at):
        fields[match[1]], at = match[2], match.end()
    if not text.startswith("{") or text[at:].strip() != "}" or set(fields) != {"descr", "fortran_order", "shape"}:
        raise ParseError("its .npy header cannot be read")
    if fields["fortran_order"] not in ("True", "False") or not fields["descr"].startswith("'"):
        raise ParseError("its .npy header cannot be read")
    return NpyHeader(fields["descr"].strip("'"), _shape(fields["shape"]), fields["fortran_order"] == "True", start)


def _shape(text: str) -> tuple[int, ...]:
    """(2, 3) and (2,) of a header. Raises ParseError."""
    if not re.fullmatch(r"\((?:|\d{1,16}L?, ?|\d{1,16}L?(?:, ?\d{1,16}L?)+,? ?)\)", text):
        raise ParseError("its .npy header names a shape that cannot be read")
    sides = tuple(int(side) for side in re.findall(r"\d+", text))
    count = 1
    for side in sides:
        count *= max(side, 1)
        if count > ELEMENTS or len(sides) > DIMENSIONS:
            raise ParseError(f"its .npy header names a shape of more than {ELEMENTS} elements")
    return sides
