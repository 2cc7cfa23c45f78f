"""Reads the json member of a sample: columns that downloaders wrote, which are kept apart from each other.

Downloaders write NaN for what is missing, numbers of any length and halves of surrogate pairs. A value that cannot be
used counts as missing and does no harm to the other columns; what is no object of columns is rejected.
"""

from __future__ import annotations

import json
import math
from typing import Any

from pipeline.errors import RecordRejected

MOST_BYTES = 16 * 1024 * 1024
DIGITS = 20  # of an integer that is read exactly


def read_columns(data: bytes) -> dict[str, Any]:
    """The columns by name. Numbers beyond the range of float64, NaN and infinity are None. Raises RecordRejected,
    json_unreadable, for what is no JSON object in UTF-8 of at most MOST_BYTES, or names a key twice."""
    if len(data) > MOST_BYTES:
        raise RecordRejected("json_unreadable", f"it has {len(data)} bytes, {MOST_BYTES} at most are read")
    try:
        columns = _DECODER.decode(str(data, "utf-8"))
    except RecursionError:
        raise RecordRejected("json_unreadable", "it nests too deeply") from None
    except ValueError as error:
        raise RecordRejected("json_unreadable", str(error)) from None
    if not isinstance(columns, dict):
        raise RecordRejected("json_unreadable", "it is not an object")
    return columns


def _integer(digits: str) -> int | float | None:
    return int(digits) if len(digits) <= DIGITS else _number(digits)


def _number(digits: str) -> float | None:
    value = float(digits)
    return value if math.isfinite(value) else None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("it names a key twice")
    return value


_DECODER = json.JSONDecoder(
    parse_int=_integer, parse_float=_number, parse_constant=lambda _: None, object_pairs_hook=_object
)
