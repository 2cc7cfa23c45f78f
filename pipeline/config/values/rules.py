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
    """One rule, KEY OP VALUE. number: VALUE as a number; None where it is not one."""

    key: str
    op: str
    value: str
    number: float | None

    def __str__(self) -> str:
        return f"{self.key}{self.op}{self.value}"

    def holds(self, member_value: Any) -> bool | None:
        """Whether the rule holds for the value of a sample's key; None where it cannot be compared because it is
        missing, null or not a number."""
        if member_value is None:
            return None
        if self.op in ORDER:
            number = _number(member_value)
            return None if number is None else ORDER[self.op](number, self.number)
        number = _number(member_value) if self.number is not None else None
        equal = number == self.number if number is not None else str(member_value).strip() == self.value
        return equal is EQUAL[self.op]


def parse_rules(texts: Iterable[str]) -> list[Rule]:
    """Rules from texts, each of one rule or a list of several: "[similarity>=0.28,punsafe<0.1]". Raises ConfigError."""
    words = (word for text in texts for word in text.strip().removeprefix("[").removesuffix("]").split(","))
    return [parse_rule(word.strip().strip("'\"")) for word in words]


def parse_rule(text: str) -> Rule:
    """The rule that a text states. Raises ConfigError unless it is KEY OP VALUE; >=, <=, > and < need a number."""
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
    """A finite number from a number or its text; None for anything else, such as true or false."""
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
