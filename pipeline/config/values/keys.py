"""From the field of a dataclass to its key on the command line, and back.

A field whose key is a word of Python ends in an underscore: class_ has the key `class`.
"""

from __future__ import annotations

import keyword


def key_of(field: str) -> str:
    """The key of a field."""
    key = field.removesuffix("_")
    return key if keyword.iskeyword(key) else field


def field_of(key: str) -> str:
    """The field of a key."""
    return f"{key}_" if keyword.iskeyword(key) else key
