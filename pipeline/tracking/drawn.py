"""The numbers of a row of metrics under the names that every tracker draws them by: KIND/NAME, against n."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NOT_DRAWN = ("n", "time")


def drawn(row: Mapping[str, Any]) -> dict[str, int | float]:
    """The numbers of a row by name, such as train/loss; those in nested dicts have dotted names. Truth values, texts
    and lists are not drawn."""
    return {f"{row['kind']}/{name}": value for name, value in _numbers(row) if name not in NOT_DRAWN}


def _numbers(row: Mapping[str, Any], prefix: str = "") -> list[tuple[str, int | float]]:
    numbers: list[tuple[str, int | float]] = []
    for key, value in row.items():
        if isinstance(value, Mapping):
            numbers += _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            numbers.append((prefix + str(key), value))
    return numbers
