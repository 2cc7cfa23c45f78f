"""Whether figures that were made again are those of a card."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from pipeline.errors import ConfigError
from pipeline.log import show

TOLERANCE = 1e-3
"""Relative difference within which a figure equals the card's: kinds of device and versions of libraries cause it."""


class Card(Protocol):
    """A card of any kind."""

    @property
    def metrics(self) -> dict[str, Any]: ...
    @property
    def versions(self) -> dict[str, str]: ...
    def line(self) -> str: ...


def verdict(card: Card, reproduced: Card, leave_out: Sequence[str] = ("seconds",)) -> int:
    """Print how far figures that were made again differ from a card's, and which versions do. Returns exit status 1
    beyond TOLERANCE. leave_out: figures that are never the same again."""
    show(reproduced.line())
    for name, present_version in reproduced.versions.items():
        if (version := card.versions.get(name)) != present_version:
            show(f"{name}: {version} then, {present_version} now")
    farthest = max(differences(card.metrics, reproduced.metrics, leave_out).items(), key=lambda pair: pair[1])
    if farthest[1] > TOLERANCE:
        name = farthest[0]
        show(f"not reproduced: {name} is {reproduced.metrics.get(name)}, the card says {card.metrics.get(name)}")
        return 1
    show(f"reproduced: the figures are those of the card, {farthest[0]} to {farthest[1]:.1g} of its size")
    return 0


def run_of(from_card: str, run: str) -> str:
    """The run whose card is at `from_card`: `run`, or where that is "" the run in whose evals/ the card lies. Raises
    ConfigError where it lies in none."""
    parts = from_card.rsplit("/", 3)
    parts = [".", *parts] if len(parts) == 3 else parts
    if not run and not (len(parts) == 4 and parts[1] == "evals"):
        raise ConfigError(f"from_card={from_card} does not lie in a run's evals/: name the run with run=")
    return run or parts[0] or "/"


def differences(
    card: Mapping[str, Any], again: Mapping[str, Any], leave_out: Sequence[str] = ("seconds",)
) -> dict[str, float]:
    """Relative difference of every figure; infinity for a figure that only one side has."""
    numbers = {
        name
        for metrics in (card, again)
        for name, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name not in leave_out
    }
    by_figure = {}
    for name in sorted(numbers):
        before, after = _figure(card, name), _figure(again, name)
        same = before == after or (math.isnan(before) and math.isnan(after))
        difference = 0.0 if same else abs(before - after) / max(abs(before), 1e-12)
        by_figure[name] = math.inf if math.isnan(difference) else difference
    return by_figure


def _figure(metrics: Mapping[str, Any], name: str) -> float:
    """A figure; infinity where it is missing, NaN where it is none."""
    value = metrics.get(name, math.inf)
    return math.nan if value is None else value
