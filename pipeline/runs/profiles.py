"""Averages of any width, made when training is over from snapshots of a few (Karras et al. 2024, section 3.2).

A power-function average of exponent gamma after t samples weighs the weights at sample s by s^gamma, up to t. Its
relative width is the standard deviation of that profile over t. Profiles of other exponents, and of earlier times, add
up to nearly any other: the least-squares fit of the wanted profile says how much of each snapshot to take.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Profile:
    """A power-function average: exponent, and samples seen."""

    gamma: float
    n: int


def gamma_of(width: float) -> float:
    """Exponent of the average whose relative width is `width`, 0 to 1/sqrt(12): the largest root of Karras et al. 2024,
    equation 126, width^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3))."""
    t = width**-2
    return float(np.roots([1.0, 7.0, 16.0 - t, 12.0 - t]).real.max())


def width_of(gamma: float) -> float:
    """The other way."""
    return math.sqrt((gamma + 1.0) / ((gamma + 2.0) ** 2 * (gamma + 3.0)))


def inner_product(a: Profile, b: Profile) -> float:
    """Integral of the product of two profiles, each of which has the integral 1 over its own time."""
    first, last = min(a, b, key=lambda p: p.n), max(a, b, key=lambda p: p.n)
    ratio = (first.n / last.n) ** last.gamma
    return (a.gamma + 1.0) * (b.gamma + 1.0) * ratio / ((a.gamma + b.gamma + 1.0) * last.n)


def coefficients(snapshots: Sequence[Profile], wanted: Profile) -> tuple[np.ndarray, float]:
    """How much of each snapshot (K,) float64 adds up to the wanted profile, as nearly as can be; and how far from it
    the sum is: the L2 norm of the difference over that of the wanted profile. The coefficients add up to 1."""
    scale = [math.sqrt(inner_product(p, p)) for p in snapshots]
    gram = np.array([[inner_product(a, b) for b in snapshots] for a in snapshots])
    wanted_by = np.array([inner_product(p, wanted) for p in snapshots])
    # Each profile over its norm, or early ones dwarf the rest; and a row that holds the sum to 1, weighed heavily.
    found = np.linalg.lstsq(gram / np.outer(scale, scale), wanted_by / scale, rcond=1e-12)[0] / scale
    found /= found.sum()
    whole = inner_product(wanted, wanted)
    square = whole - 2 * float(found @ wanted_by) + float(found @ gram @ found)
    return found, math.sqrt(max(square, 0.0) / whole)


OWN = "ema"
"""Kind of the average that evaluations and everything else take by themselves."""


def kind_of(average: float) -> str:
    """What checkpoints call an average beside the run's own: of a half-life in samples (1 or more) or a relative width
    (below 1)."""
    return f"ema-{average:g}" if average >= 1 else f"power-{average:g}"
