"""Carried out of other files."""

from __future__ import annotations

from collections.abc import Sequence


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = ()) -> str:
    """Columns for a terminal, two spaces in; `left`: those that begin at the left."""
    widths = [max(map(len, column)) for column in zip(headings, *rows)]

    def line(cells: Sequence[str]) -> str:
        padded = [cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths))]
        return ("  " + "   ".join(padded)).rstrip()

    return "\n".join(map(line, [headings, *rows])) + "\n"
