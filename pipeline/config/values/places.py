"""Whether two paths or URLs name one place."""

from __future__ import annotations

import os
import re


def place(url: str) -> str:
    """A path or URL as one of the spellings of its place: ./a, a/ and a link to a are a. Two that are equal are one
    place; different ones may still hold the same (runs/distinct.py compares what they hold)."""
    scheme, separator, rest = url.partition("://")
    if separator:
        return f"{scheme.lower()}://{re.sub('/+', '/', rest).rstrip('/')}"
    return os.path.realpath(os.path.expanduser(url)) if url else ""
