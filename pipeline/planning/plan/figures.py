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
