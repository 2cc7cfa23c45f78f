"""Reads the json member of a sample: columns that downloaders wrote, which are kept apart from each other.

Downloaders write NaN for what is missing, numbers of any length and halves of surrogate pairs. A value that cannot be
used counts as missing and does no harm to the other columns; what is no object of columns is rejected.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

from pipeline.errors import RecordRejected

MOST_BYTES = 16 * 1024 * 1024
DIGITS = 20  # of an integer that is read exactly
MOST_CLASS = 2048  # up to which float16 holds whole numbers
ROW = 5  # class, x0, y0, x1, y1


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


def read_boxes(entries: Any) -> np.ndarray:
    """(N, 5) float64 of a column [[class, x0, y0, x1, y1], ...]. Raises RecordRejected: boxes_missing or
    boxes_unreadable."""
    if entries is None:
        raise RecordRejected("boxes_missing")
    if not isinstance(entries, list):
        raise RecordRejected("boxes_unreadable", "it is not a list")
    if not all(isinstance(entry, list) and len(entry) == ROW and all(map(_is_number, entry)) for entry in entries):
        raise RecordRejected("boxes_unreadable", "not every box is [class, x0, y0, x1, y1] of numbers")
    boxes = np.array(entries, dtype=np.float64).reshape(-1, ROW)
    classes = boxes[:, 0]
    if (classes != np.floor(classes)).any() or (classes < 0).any() or (classes > MOST_CLASS).any():
        raise RecordRejected("boxes_unreadable", f"a class is no whole number of 0 to {MOST_CLASS}")
    return boxes


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


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
