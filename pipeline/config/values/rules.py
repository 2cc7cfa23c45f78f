"""Rules on a sample's metadata: "similarity>=0.28", "NSFW==UNLIKELY"."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from pipeline.errors import ConfigError

ORDER: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
EQUAL = {"==": True, "!=": False}
PATTERN = re.compile(r"\s*(?P<key>[^<>=!]+?)\s*(?P<op>>=|<=|==|!=|>|<)\s*(?P<value>[^<>=!]+?)\s*")


@dataclass(frozen=True)
class Rule:
    """KEY OP VALUE; number: VALUE as a number, None when it is not one."""

    key: str
    op: str
    value: str
    number: float | None

    def __str__(self) -> str:
        return f"{self.key}{self.op}{self.value}"

    def holds(self, found: Any) -> bool | None:
        """Whether the rule holds for a column's value; None when that cannot be compared (missing, null, not a
        number)."""
        if found is None:
            return None
        if self.op in ORDER:
            number = _number(found)
            return None if number is None else ORDER[self.op](number, self.number)
        number = _number(found) if self.number is not None else None
        equal = number == self.number if number is not None else str(found).strip() == self.value
        return equal is EQUAL[self.op]


def parse_rules(texts: Iterable[str]) -> list[Rule]:
    """Rules from texts of one each, or of several as a list: "[similarity>=0.28,punsafe<0.1]". Raises ConfigError."""
    words = (word for text in texts for word in text.strip().removeprefix("[").removesuffix("]").split(","))
    return [parse_rule(word.strip().strip("'\"")) for word in words]


def parse_rule(text: str) -> Rule:
    """Raises ConfigError for anything but KEY OP VALUE, with a number after >=, <=, > and <."""
    match = PATTERN.fullmatch(text)
    if match is None:
        raise ConfigError(
            f"filters.keep: {text!r} is not KEY OP VALUE with one of >=, <=, >, <, ==, != (such as similarity>=0.28)"
        )
    rule = Rule(match["key"], match["op"], match["value"], _number(match["value"]))
    if rule.op in ORDER and rule.number is None:
        raise ConfigError(f"filters.keep: {text!r} compares with {rule.value!r}, which is not a number")
    return rule


def _number(value: Any) -> float | None:
    """A finite number, given as one or written out; a truth value is none."""
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
