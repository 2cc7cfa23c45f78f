"""The figures of a plan, each with its basis: measured, calibrated on the user's machine, or arithmetic.

Imports nothing of ours, so that whatever computes figures may use these types.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Basis = Literal["measured", "calibrated", "arithmetic"]
"""measured: a committed measurement says it. calibrated: `latentmill calibrate` measured it on the user's machine.
arithmetic: a formula or a stated assumption says it. A product of a measurement and a formula has the basis of what
its error comes from, the measurement or the assumption, and `where` says so."""


@dataclass(frozen=True)
class Figure:
    """One number of a plan."""

    name: str
    """What it is, in a few words, unique within its section: "hours", "images per second"."""
    value: float
    """In `unit`; finite and >= 0."""
    unit: str
    """"images", "bytes", "images/s", "hours", "FLOP", ...; "" = a plain number, "share" = a part of 1."""
    basis: Basis
    where: str
    """Machine and file of the measurement, or the formula with its assumptions."""


@dataclass(frozen=True)
class Rate:
    """How much is done in a second, and who says so."""

    per_s: float
    """Units of work (images, steps, bytes: the function that returns it says which) per second; > 0."""
    unit: str
    """Of the work per second: "images/s"."""
    basis: Basis
    where: str
    """Machine and file of the measurement, or the formula with its assumptions."""
    reduced: int = 1
    """Of training: ranks of one machine whose traffic with each other is in it, in ZeRO 2 and one micro-batch; 1 =
    none."""


FORMAT = 1
"""Version of a plan's JSON."""
SIZES = {"bytes": ("B", "kB", "MB", "GB", "TB", "PB"), "FLOP": ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP")}


def value_words(value: float, unit: str) -> str:
    """A figure's value with its unit, for people: 1.23 TB, 40.1%, 12.5 h, 512 images/s."""
    of, per, _ = unit.partition("/s")
    if of in SIZES:
        size = 0
        while value >= 999.5 and size < len(SIZES[of]) - 1:
            value, size = value / 1000, size + 1
        number = f"{value:.0f}" if not size or value >= 100 else f"{value:.3g}"
        return f"{number} {SIZES[of][size]}{per}"
    if unit == "share":
        return f"{value:.1%}" if value >= 0.01 or not value else f"{value:.2g}" if value < 1e-4 else f"{value:.2%}"
    if unit == "hours":
        if value < 1:
            return f"{60 * value:.3g} min" if value >= 1 / 60 else f"{3600 * value:.3g} s"
        return f"{value:,.1f} h" if value >= 10 else f"{value:.3g} h"
    text = f"{value:,.0f}" if value >= 1000 or value == int(value) else f"{value:.3g}"
    return text if unit in ("", "images") else f"{text} {unit}"
