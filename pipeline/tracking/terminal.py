"""Text for a terminal: tables, durations, and what is drawn over its former self."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence
from typing import TextIO

COLUMNS, ROWS = 80, 24
"""Size of a terminal that does not say its own."""


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = ()) -> str:
    """Lines of columns, indented by two spaces. left: numbers of the columns that are aligned on the left."""
    widths = [max(map(len, column)) for column in zip(headings, *rows)]

    def line(cells: Sequence[str]) -> str:
        padded = [cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths))]
        return ("  " + "   ".join(padded)).rstrip()

    return "\n".join(map(line, [headings, *rows])) + "\n"


def duration(seconds: float) -> str:
    """Roughly how long: 40 s, 12 min, 3.5 h, 2.1 d."""
    for unit, size in (("d", 86400), ("h", 3600)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{max(0.0, seconds):.0f} s"


class Redrawn:
    """Lines on a terminal that each drawing puts in the place of the one before. Nothing else may be written to it in
    between, or it is overwritten in part."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self._widths: list[int] = []  # of the lines of the last drawing

    def size(self) -> tuple[int, int]:
        """Columns and rows of the terminal as it is now."""
        try:
            columns, rows = os.get_terminal_size(self.stream.fileno())
        except OSError:
            return COLUMNS, ROWS
        return columns or COLUMNS, rows or ROWS

    def draw(self, text: str) -> None:
        """Draw lines of printable text. Those that are wider than the terminal are cut there, and where there are more
        of them than it has rows, the last one says how many are left out."""
        columns, rows = self.size()
        lines = text.splitlines()
        if len(lines) > rows - 1:
            shown = max(rows - 2, 1)
            lines = [*lines[:shown], f"  ... and {len(lines) - shown} more"]
        drawn = [cut(line, columns) for line in lines]
        # Erased before it is written: after a line as wide as the terminal its last character would be.
        body = "".join(f"\x1b[K{line}\n" for line in drawn)
        height = sum(max(1, -(-width // columns)) for width in self._widths)  # on a terminal that was narrowed
        up = f"\x1b[{height}A" if height else ""
        # In one piece, so that nothing flickers; without wrapping, whatever the terminal takes for wide.
        self.stream.write(f"\x1b[?7l\r{up}{body}\x1b[J\x1b[?7h")
        self.stream.flush()
        self._widths = [sum(map(_width, line)) for line in drawn]


def cut(text: str, columns: int) -> str:
    """The beginning of a text that fits into so many columns."""
    used = 0
    for place, character in enumerate(text):
        used += _width(character)
        if used > columns:
            return text[:place]
    return text


def _width(character: str) -> int:
    """Columns that a character takes."""
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
