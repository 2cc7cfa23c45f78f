"""Brace patterns, {00000..00009} and {a,b}, counted before they are expanded: a short pattern can name billions."""

from __future__ import annotations

import re

from pipeline.errors import SourceError

NAMES = 1_000_000
"""Most names that one pattern may stand for."""
CHARACTERS = 1 << 30
"""Most characters of all these names."""
LONGEST, DEEPEST = 1 << 16, 32
"""Longest pattern in characters, and deepest nesting of braces."""
LONGEST_NUMBER = 20
"""Digits of a number in a range."""
RANGE = re.compile(r"(?:(-?\d+)\.\.(-?\d+)|([A-Za-z])\.\.([A-Za-z]))(?:\.\.-?(\d+))?")


def expand_braces(pattern: str) -> list[str]:
    """The names that a pattern stands for, in its order. Raises SourceError for braces that do not match, and for more
    than NAMES names or CHARACTERS characters."""
    if "{" not in pattern and "}" not in pattern:
        return [pattern]
    from braceexpand import braceexpand

    try:
        if len(pattern) > LONGEST:
            raise SourceError(f"a pattern of {len(pattern)} characters; {LONGEST} at most are read")
        count = _count(pattern, 0)
        if count > NAMES or count * len(pattern) > CHARACTERS:
            raise SourceError(
                f"{pattern[:200]}: it names {count:,} objects, {NAMES:,} at most are read from one pattern"
            )
        return list(braceexpand(pattern, escape=False))
    except ValueError as error:
        raise SourceError(f"{pattern[:200]}: the braces do not match") from error


def _count(pattern: str, depth: int) -> int:
    """Number of names of a pattern. Raises SourceError for braces that nest too deep."""
    if depth > DEEPEST:
        raise SourceError(f"a pattern whose braces nest deeper than {DEEPEST} levels")
    count, open_braces, start = 1, 0, 0
    for at, character in enumerate(pattern):
        if character == "{":
            start = at + 1 if open_braces == 0 else start
            open_braces += 1
        elif character == "}":
            open_braces -= 1
            if open_braces == 0:
                count *= _count_inside(pattern[start:at], depth + 1)
    return count


def _count_inside(text: str, depth: int) -> int:
    """Number of names of what stands between a pair of braces."""
    if match := RANGE.fullmatch(text):
        first, last, first_letter, last_letter, step = match.groups()
        if len(text) > 3 * LONGEST_NUMBER:
            raise SourceError(f"{{{text[:60]}}}: numbers of more than {LONGEST_NUMBER} digits")
        span = abs(int(last) - int(first)) if first else abs(ord(last_letter) - ord(first_letter))
        return span // max(int(step or 1), 1) + 1
    parts, open_braces, start = [], 0, 0
    for at, character in enumerate(text):
        open_braces += (character == "{") - (character == "}")
        if character == "," and open_braces == 0:
            parts.append(text[start:at])
            start = at + 1
    parts.append(text[start:])
    return sum(_count(part, depth) for part in parts)
