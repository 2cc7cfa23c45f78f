"""The types of a dataclass's fields. They are written as text, which takes some ten microseconds each to read."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any, get_type_hints


def hints_of(cls: Any, *, bounds: bool = False) -> Mapping[str, Any]:
    """The type of each field. bounds: with what Annotated says."""
    return _hints(cls, bounds)


@lru_cache(maxsize=256)
def _hints(cls: Any, bounds: bool) -> Mapping[str, Any]:
    return MappingProxyType(get_type_hints(cls, include_extras=bounds))
