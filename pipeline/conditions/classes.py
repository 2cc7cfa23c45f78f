"""cond.class: the class of a whole image."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from pipeline.conditions.facts import ClassFacts
from pipeline.conditions.names import number_of, numbers_of
from pipeline.errors import ConfigError, RecordRejected
from pipeline.parsing.text import one_line

WHOLE = re.compile(rb"[+-]?[0-9]{1,18}")
LONGEST = 80
"""Bytes of a value that a message shows."""
JSON, FOLDER = "json:", "folder"


def read_class(cls: bytes | None, columns: Mapping[str, Any] | None, facts: ClassFacts, sample: str = "") -> np.ndarray:
    """The class of a sample, int32 ().

    cls: bytes of its .cls member, a whole number in ASCII. columns: its .json member. sample: its key, whose first
    folder is the name of a class. facts.key says which of the three is read; a column holds a whole number (3 or 3.0),
    its digits as text, or one of facts.names. Raises RecordRejected: class_missing, class_unreadable or
    class_out_of_range.
    """
    if facts.key == FOLDER:
        folder, _, file = sample.partition("/")
        if not file or folder not in facts.names:
            raise RecordRejected("class_missing", f"{_shown(sample)} lies in no folder that is named like a class")
        return np.array(facts.names.index(folder), dtype=np.int32)
    value: Any = cls if facts.key == "cls" else (columns or {}).get(facts.key.removeprefix(JSON))
    if value is None:
        raise RecordRejected("class_missing", f"there is no {facts.key}")
    number = _whole(value, facts)
    if not 0 <= number < facts.count:
        raise RecordRejected("class_out_of_range", f"{_shown(number)}, the classes are 0 to {facts.count - 1}")
    return np.array(number, dtype=np.int32)


def class_of(word: str | int, facts: ClassFacts) -> int:
    """The class that a number or a name means, for sampling. Raises ConfigError, which offers names that are near."""
    return number_of(word, facts.names, facts.count)


def _whole(value: Any, facts: ClassFacts) -> int:
    """The number that a value holds. Raises RecordRejected, class_unreadable."""
    if isinstance(value, bytes):
        if len(value) <= LONGEST and WHOLE.fullmatch(value.strip()):
            return int(value)
        raise RecordRejected("class_unreadable", f"{_shown(value)} is not a whole number in ASCII")
    if isinstance(value, str):
        if WHOLE.fullmatch(value.strip().encode("utf-8", "replace")) and value.strip() not in numbers_of(facts.names):
            return int(value)
        try:
            return number_of(value, facts.names, facts.count)
        except ConfigError as error:
            raise RecordRejected("class_unreadable", str(error)) from None
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise RecordRejected("class_unreadable", f"{_shown(value)} is neither a whole number nor a name")


def _shown(value: Any) -> str:
    """A value for a message, cut where it is long."""
    if isinstance(value, int) and abs(value) >= 10**LONGEST:
        return f"a number of {value.bit_length()} bits"
    return one_line(str(value[:LONGEST] if isinstance(value, bytes | str | list) else value))[:LONGEST]
