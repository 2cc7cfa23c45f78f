"""Long lists of alike rows, checked column by column: a manifest has hundreds of thousands of them.

A check says in one pass whether all values of a column are right. Where one cannot, the rows are built one by one by
`pipeline.parsing.typed.build`, which says what is wrong and where.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, TypeVar

from pipeline.data.format.bounds import MOST_SIDE, TAR_NAME
from pipeline.errors import ParseError
from pipeline.parsing.bounds import LONGEST_NAME
from pipeline.parsing.typed import build

T = TypeVar("T")
Check = Callable[[Sequence[Any]], bool]
HEXADECIMAL = re.compile("[0-9a-f]*")
FEW_BYTES = 1 << 16
"""A text of at most so many bytes may hold anything."""
LIST_BYTES, ITEM_BYTES = 24, 8
"""Bytes of a text for each list or dictionary, and for each item, at the least: those of our own files have more."""


def build_rows(cls: type[T], rows: Any, checks: dict[str, Check], where: str) -> tuple[T, ...]:
    """Instances of the dataclass `cls` from a list of dictionaries, with all of its fields and no others.

    checks: of the column of each field. where: name of the list in messages. Raises ParseError.
    """
    if type(rows) is not list or not set(map(type, rows)) <= {dict}:
        raise ParseError(f"{where} is no list of groups of keys")
    names = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for keys in set(map(tuple, rows)):
        if set(keys) != names:
            wrong = ", ".join(sorted(names ^ set(keys))[:5])
            raise ParseError(f"{where} has a row with missing or unknown fields ({wrong})")
    if not all(check([row[name] for row in rows]) for name, check in checks.items()):
        return tuple(_one(cls, row, f"{where}[{number}]") for number, row in enumerate(rows))
    lists = [name for name in names if rows and type(rows[0][name]) is list]
    if lists:
        return tuple(cls(**{**row, **{name: tuple(row[name]) for name in lists}}) for row in rows)
    return tuple(cls(**row) for row in rows)


def whole(low: int, high: int) -> Check:
    """Whole numbers from `low` to `high`."""
    return lambda column: not column or (set(map(type, column)) == {int} and low <= min(column) and max(column) <= high)


def digests(column: Sequence[Any]) -> bool:
    """SHA-256 as 64 hexadecimal digits."""
    if not set(map(type, column)) <= {str} or not set(map(len, column)) <= {64}:
        return False
    return HEXADECIMAL.fullmatch("".join(column)) is not None


def tar_names(column: Sequence[Any]) -> bool:
    """Keys of tars, as in bounds.TarName."""
    if not set(map(type, column)) <= {str} or max(map(len, column), default=0) > LONGEST_NAME:
        return False
    return all(map(TAR_NAME.fullmatch, column))


def texts(column: Sequence[Any]) -> bool:
    """Names, as in bounds.Name."""
    if not set(map(type, column)) <= {str} or max(map(len, column), default=0) > LONGEST_NAME:
        return False
    return min(map(len, column), default=1) >= 1 and "\0" not in "".join(column)


def pairs(column: Sequence[Any]) -> bool:
    """[width, height]."""
    if not set(map(type, column)) <= {list} or not set(map(len, column)) <= {2}:
        return False
    return whole(1, MOST_SIDE)(list(chain.from_iterable(column)))


def counts(column: Sequence[Any]) -> bool:
    """Numbers of samples by reason."""
    if not set(map(type, column)) <= {dict}:
        return False
    reasons = set(chain.from_iterable(column))
    return texts(list(reasons)) and whole(0, 2**53)(list(chain.from_iterable(row.values() for row in column)))


def require_dense(data: bytes | memoryview) -> None:
    """Raise ParseError for a long JSON text of tiny values, which would take twenty times its bytes of memory."""
    if len(data) <= FEW_BYTES:
        return
    text = bytes(data)
    if (text.count(b"[") + text.count(b"{")) * LIST_BYTES > len(text) or text.count(b",") * ITEM_BYTES > len(text):
        raise ParseError(f"it has {len(text)} bytes of lists and values too small for what it should hold")


def _one(cls: type[T], row: Any, where: str) -> T:
    """One row. Raises ParseError, which names it."""
    try:
        return build(cls, row)
    except ParseError as error:
        raise ParseError(f"{where}.{error}") from None
