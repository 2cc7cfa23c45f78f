"""The types of a dataclass's fields. They are written as text, which takes ten microseconds each to read."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any, cast, get_type_hints


def hints_of(cls: type[Any], *, bounds: bool = False) -> Mapping[str, Any]:
    """The type of each field. bounds: with what Annotated says."""
    return _hints_of(cast(Hashable, cls), bounds)


@lru_cache(maxsize=256)
def _hints_of(cls: Any, bounds: bool) -> Mapping[str, Any]:
    return MappingProxyType(get_type_hints(cls, include_extras=bounds))
