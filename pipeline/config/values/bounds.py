"""Bounds on single values of a configuration, declared beside the field, and the one-line refusals of values outside.

    samples: Annotated[int, Ge(1)] = 100_000
    multipliers: tuple[Annotated[int, Ge(1)], ...] = (1, 2)        # a refusal names the element
    betas: Annotated[tuple[float, float], Between(0, 1, "[)")]     # every element too; a refusal shows the whole list

`check_bounds` reads the declarations when a configuration is checked, and `latentmill VERB --help` prints them. What
relates several fields is in config/check/.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import repeat
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pipeline.config.values.hints import hints_of
from pipeline.errors import ConfigError, Unset


@dataclass(frozen=True)
class Ge:
    """`low` or more. says: the words of the refusal, in place of the standard ones."""

    low: float
    says: str = ""

    def admits(self, value: float) -> bool:
        return value >= self.low

    @property
    def words(self) -> str:
        return self.says or f"{self.low:g} or more is wanted"

    def __str__(self) -> str:
        return f">= {self.low:g}"


@dataclass(frozen=True)
class Gt:
    """More than `low`. says: as in Ge."""

    low: float
    says: str = ""

    def admits(self, value: float) -> bool:
        return value > self.low

    @property
    def words(self) -> str:
        return self.says or f"a number above {self.low:g} is wanted"

    def __str__(self) -> str:
        return f"> {self.low:g}"


@dataclass(frozen=True)
class Between:
    """From `low` to `high`. ends: [ or ] where an end itself is admitted, ( or ) where it is not. says: as in Ge."""

    low: float
    high: float
    ends: Literal["[]", "[)", "(]", "()"] = "[]"
    says: str = ""

    def admits(self, value: float) -> bool:
        above = value >= self.low if self.ends[0] == "[" else value > self.low
        return above and (value <= self.high if self.ends[1] == "]" else value < self.high)

    @property
    def words(self) -> str:
        low = f"from {self.low:g} to" if self.ends[0] == "[" else f"above {self.low:g} and"
        at_most = "" if self.ends[0] == "[" else "at most "
        high = f"{at_most}{self.high:g}" if self.ends[1] == "]" else f"below {self.high:g}"
        return self.says or f"a number {low} {high} is wanted"

    def __str__(self) -> str:
        top = f"{self.high:g}" if self.high < 2**53 else f"2**{math.log2(self.high):g}"
        low, high = f">{'=' * (self.ends[0] == '[')} {self.low:g}", f"<{'=' * (self.ends[1] == ']')} {top}"
        return f"{low} and {high}"


@dataclass(frozen=True)
class OrZero:
    """0, which turns something off, or what another bound admits. says: as in Ge."""

    bound: Ge | Gt
    says: str

    def admits(self, value: float) -> bool:
        return value == 0 or self.bound.admits(value)

    @property
    def words(self) -> str:
        return self.says

    def __str__(self) -> str:
        return f"0 or {self.bound}"


Bound = Ge | Gt | Between | OrZero

Seed = Annotated[int, Between(0, 2**63, "[)", "a whole number from 0 to below 2**63 is wanted")]
"""A seed: philox.py takes 64 bits, and files hold whole numbers with a sign."""
SeedOrNone = Annotated[int, Between(-1, 2**63, "[)", "a whole number from 0 to below 2**63, or -1, is wanted")]
"""The same, with -1 for none."""


def bounds_of(kind: Any) -> Iterator[tuple[Bound, bool]]:
    """(bound, whether it holds for each element of a list) of every bound that a type declares."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        yield from ((bound, _is_list(kind)) for bound in arguments[1:] if isinstance(bound, Bound))
        yield from bounds_of(arguments[0])
    elif origin in (Union, types.UnionType):
        for alternative in arguments:
            yield from bounds_of(alternative)
    elif origin is tuple:
        yield from dict.fromkeys((bound, True) for element in arguments for bound, _ in bounds_of(element))


def check_bounds(config: Any, path: str = "") -> None:
    """Check every value of a config dataclass against the bound beside its field: its own fields, then its groups.

    path: prefix of the keys in messages. Raises ConfigError for the first value outside; NaN and infinity always are.
    """
    hints = hints_of(type(config), bounds=True)
    values = {}
    for field in dataclasses.fields(config):
        with suppress(Unset):  # who reads it is told
            values[field.name] = getattr(config, field.name)
    groups = {name: value for name, value in values.items() if dataclasses.is_dataclass(value)}
    for name, value in values.items():
        if name not in groups:
            _check_value(hints[name], value, f"{path}{name}")
    for name, group in groups.items():
        check_bounds(group, f"{path}{name}.")


def _check_value(kind: Any, value: Any, key: str) -> None:
    """Raise ConfigError where a value is outside of a bound that its type declares."""
    origin, arguments = get_origin(kind), get_args(kind)
    is_list = isinstance(value, tuple | list)
    if origin is Annotated:
        for bound in arguments[1:]:
            holds = all(math.isfinite(number) and bound.admits(number) for number in (value if is_list else (value,)))
            require(holds, f"{key}={_shown(value)}: {bound.words}")
        _check_value(arguments[0], value, key)
    elif origin in (Union, types.UnionType):
        for alternative in arguments:
            if value is not None and _is_list(alternative) == is_list:
                _check_value(alternative, value, key)
    elif origin is tuple:
        kinds = repeat(arguments[0]) if arguments[-1] is Ellipsis else arguments
        for element_kind, element in zip(kinds, value):
            _check_value(element_kind, element, key)


def _is_list(kind: Any) -> bool:
    """Whether a type is a tuple's, which is how configurations hold lists; with a bound or without."""
    return get_origin(get_args(kind)[0] if get_origin(kind) is Annotated else kind) is tuple


def _shown(value: Any) -> str:
    if isinstance(value, tuple | list):
        return str(list(value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def require(holds: bool, message: str) -> None:
    """Raise ConfigError with the message unless it holds."""
    if not holds:
        raise ConfigError(message)


def some_text(name: str, value: str, what: str) -> None:
    """Raise ConfigError where a text that must be given is empty. what: what it should name."""
    require(value.strip() != "", f"{name} is missing: give {name}=... ({what})")
