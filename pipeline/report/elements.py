"""Pieces of HTML that pages are made of.

Untrusted strings (captions, names, settings) enter a page only through `text` and the functions here that call it.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from pipeline.parsing.text import redact

LONGEST = 300  # characters of a caption or a name; the rest is cut
BEGINNING = (
    b'<!doctype html><html lang="en"><head><meta charset="utf-8">'
    b'<meta name="viewport" content="width=device-width,initial-scale=1">'
    b'<meta name="color-scheme" content="light dark">'
)
"""How every page begins, so that an earlier one is known (publish.py)."""
NOT_TEXT = ("Cc", "Cs")  # Unicode categories: control characters, lone surrogates


def document(title: str, body: str, scripts: str = "") -> str:
    """A whole page that loads nothing, light and dark. body, scripts: HTML, the latter after the main element."""
    return (
        f"{BEGINNING.decode()}<title>{text(title)} – latentmill</title>"
        f"<style>{STYLE.read_text(encoding='utf-8')}</style></head>"
        f"<body><main>{body}</main>{scripts}</body></html>"
    )


def text(value: str, limit: int = LONGEST) -> str:
    """Any string as text of a page or of an attribute: without secrets, escaped, cut at `limit` characters, and with
    U+FFFD in place of control characters and lone surrogates."""
    value = redact(value)
    cut = value if len(value) <= limit else f"{value[:limit]}…"
    return escape("".join(c if c == "\n" or unicodedata.category(c) not in NOT_TEXT else "\ufffd" for c in cut))


def cell(value: str) -> str:
    """A cell of one line: a number or a short name."""
    return f"<td>{text(value)}</td>"


def prose(value: str, limit: int = LONGEST) -> str:
    """A cell whose text may wrap."""
    return f'<td class="text" dir="auto">{text(value, limit)}</td>'


def meter(part: float, whole: float) -> str:
    """A cell that states a share and shows it as a bar behind the text."""
    width = 100 * part / whole if whole else 0.0
    return f'<td class="share" style="--share:{min(max(width, 0), 100):.2f}%">{share(part, whole)}</td>'


def table(headings: Sequence[str], rows: Iterable[str], prose_first: bool = False) -> str:
    """A table of <tr> rows, which scrolls on its own when the page is too narrow. Without headings it has no head."""
    kinds = [' class="text"' if prose_first and i == 0 else "" for i in range(len(headings))]
    cells = "".join(f"<th{kind}>{text(heading)}</th>" for heading, kind in zip(headings, kinds))
    head = f"<tr>{cells}</tr>" if headings else ""
    return f'<div class="scroll"><table>{head}{"".join(rows)}</table></div>'


def folded(summary: str, content: str) -> str:
    """Content that a click on its summary opens."""
    return f"<details><summary>{text(summary)}</summary>{content}</details>"


# --------------------------------------------------------------------------------------------------------------------
# Words


def share(part: float, whole: float) -> str:
    """A share in per cent, in which 0% means none and 100% means all."""
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
