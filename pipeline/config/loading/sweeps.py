"""Texts and paths of which a sweep takes one after another: a,b or choice(a,b), each quoted where it holds a comma."""

from __future__ import annotations

import re

CHOICE = re.compile(r"\s*choice\s*\((?P<inside>.*)\)\s*", re.DOTALL)
OPEN, CLOSE = "([{", ")]}"
REFERENCE = re.compile(r"\$\{\s*oc\.(?:env|decode)\s*:\s*(?:\$\{\s*oc\.env\s*:\s*)?([A-Za-z_][A-Za-z0-9_]*)[^}]*\}+")


def swept_texts(value: str) -> list[str] | None:
    """The texts that a sweep takes in turn; None where it is one, which is then taken as it stands.

    Commas in braces and brackets separate nothing ({a,b}/*.tar), nor do those within quotes or after a backslash. A
    single text in quotes loses them, so that 'a,b' is one text with a comma.
    """
    match = CHOICE.fullmatch(value)
    pieces = _pieces(match["inside"] if match else value)
    if len(pieces) > 1 or match:
        return [_bare(piece) for piece in pieces]
    bare = _bare(value)
    return [bare] if bare != value and (value.strip()[:1] in ("'", '"') or "\\," in value) else None


def folder_word(key: str, value: str) -> str:
    """KEY=VALUE as a part of a job's folder: slashes are escaped, and of a reference to the environment its variable's
    name is kept."""
    text = without_references(value).replace("%", "%25").replace("/", "%2F").replace("\0", "%00")
    return f"{key}={text}"


def without_references(text: str) -> str:
    """`text` with the names of variables in place of references to the environment."""
    return REFERENCE.sub(r"\1", text)


def _pieces(text: str) -> list[str]:
    """`text` divided at its outermost commas."""
    pieces, begin, depth, quoted, position = [], 0, 0, "", 0
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 1
        elif quoted:
            quoted = "" if character == quoted else quoted
        elif character in "'\"" and not text[begin:position].strip():  # at the beginning of a piece alone: it's
            quoted = character
        elif character in OPEN:
            depth += 1
        elif character in CLOSE:
            depth = max(depth - 1, 0)
        elif character == "," and not depth:
            pieces.append(text[begin:position])
            begin = position + 1
        position += 1
    return [*pieces, text[begin:]]


def _bare(piece: str) -> str:
    """A piece without the blanks around it, its quotes and the backslashes before commas and quotes."""
    text = piece.strip()
    if len(text) > 1 and text[0] in "'\"" and text[-1] == text[0]:
        return re.sub(r"\\([\\'\"])", r"\1", text[1:-1])
    return text.replace("\\,", ",")
