"""Pieces of HTML that pages are made of.

What comes from strangers (captions, names, settings) enters a page through `text` alone, or through what calls it here.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

LONGEST = 300  # characters of a caption or a name; the rest is cut
NOT_TEXT = ("Cc", "Cs")  # Unicode categories: control characters, lone surrogates


def document(title: str, body: str) -> str:
    """A whole page of a body that is HTML already: no network, no script, light and dark."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{text(title)} – latentmill</title><style>{STYLE.read_text(encoding='utf-8')}</style></head>"
        f"<body><main>{body}</main></body></html>"
    )


def text(value: str, most: int = LONGEST) -> str:
    """Any string as text of a page or of an attribute: escaped, cut, and without characters that are none."""
    cut = value if len(value) <= most else f"{value[:most]}…"
    return escape("".join(c if c == "\n" or unicodedata.category(c) not in NOT_TEXT else "\ufffd" for c in cut))


def cell(value: str) -> str:
    """A cell of one line: a number or a short name."""
    return f"<td>{text(value)}</td>"


def prose(value: str, most: int = LONGEST) -> str:
    """A cell whose text may wrap."""
    return f'<td class="text" dir="auto">{text(value, most)}</td>'


def meter(part: float, whole: float) -> str:
    """A cell that says a share and shows it as a bar behind the words."""
    width = 100 * part / whole if whole else 0.0
    return f'<td class="share" style="--share:{min(max(width, 0), 100):.2f}%">{share(part, whole)}</td>'


def table(headings: Sequence[str], rows: Iterable[str], prose_first: bool = False) -> str:
    """A table of <tr> rows, which scrolls by itself when the page is too narrow. No headings: no head."""
    kinds = [' class="text"' if prose_first and i == 0 else "" for i in range(len(headings))]
    cells = "".join(f"<th{kind}>{text(heading)}</th>" for heading, kind in zip(headings, kinds))
    head = f"<tr>{cells}</tr>" if headings else ""
    return f'<div class="scroll"><table>{head}{"".join(rows)}</table></div>'


def folded(summary: str, content: str) -> str:
    """Content that opens when one asks for it."""
    return f"<details><summary>{text(summary)}</summary>{content}</details>"


# --------------------------------------------------------------------------------------------------------------------
# Words


def share(part: float, whole: float) -> str:
    """A share in per cent; 0% and 100% mean none and all."""
    if not whole or not part:
        return "0%"
    value = 100 * part / whole
    if value < 0.01:
        return "<0.01%"
    if value > 99.95:
        return "100%" if part == whole else ">99.9%"
    return f"{value:.1f}%" if value >= 10 else f"{value:.2f}%"


def amount(size: float) -> str:
    """Bytes in few characters: 812 B, 10.3 kB, 1.24 TB."""
    for bound, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(size) >= bound:
            return f"{size / bound:,.3g} {unit}" if abs(size) < 999.5 * bound else f"{size / bound:,.0f} {unit}"
    return f"{size:.0f} B"


def counted(number: int, noun: str) -> str:
    """3 shards, 1 shard."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


STYLE = Path(__file__).with_name("style.css")
