"""Averages of any width, reconstructed after training from snapshots of a few widths (Karras et al. 2024, section 3.2).

A power-function average of exponent gamma after t samples weighs the weights at sample s <= t by s^gamma. Its relative
width is the standard deviation of that profile divided by t. A linear combination of profiles of other exponents and
earlier times approximates nearly any profile: the least-squares fit to the target profile gives each snapshot's
coefficient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Profile:
    """The profile of a power-function average: gamma, its exponent, and n, the samples seen."""

    gamma: float
    n: int


def gamma_of(width: float) -> float:
    """Exponent gamma of the average with relative width `width`, 0 to 1/sqrt(12): the largest root of width^2 =
    (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) (Karras et al. 2024, equation 126)."""
    t = width**-2
    return float(np.roots([1.0, 7.0, 16.0 - t, 12.0 - t]).real.max())


def inner_product(a: Profile, b: Profile) -> float:
    """Integral of the product of two profiles, each normalised to integral 1 over [0, its n]."""
    earlier, later = min(a, b, key=lambda p: p.n), max(a, b, key=lambda p: p.n)
    ratio = (earlier.n / later.n) ** later.gamma
    return (a.gamma + 1.0) * (b.gamma + 1.0) * ratio / ((a.gamma + b.gamma + 1.0) * later.n)


def coefficients(snapshots: Sequence[Profile], target: Profile) -> tuple[np.ndarray, float]:
    """(K,) float64 coefficients, which add up to 1, of the combination of K snapshots that is nearest to the target
    profile; and the distance that remains: the L2 norm of the difference over that of the target."""
    norms = [math.sqrt(inner_product(p, p)) for p in snapshots]
    gram = np.array([[inner_product(a, b) for b in snapshots] for a in snapshots])
    products = np.array([inner_product(p, target) for p in snapshots])
    # Profiles are divided by their norms, or the early ones would dwarf the rest.
    weights = np.linalg.lstsq(gram / np.outer(norms, norms), products / norms, rcond=1e-12)[0] / norms
    weights /= weights.sum()
    target_square = inner_product(target, target)
    square = target_square - 2 * float(weights @ products) + float(weights @ gram @ weights)
    return weights, math.sqrt(max(square, 0.0) / target_square)


OWN = "ema"
"""Kind of the run's own average, which is evaluated and is every verb's default."""


def kind_of(average: float) -> str:
    """The kind that checkpoints store an average under, beside the run's own. average: a half-life in samples (1 or
    more), or a relative width (below 1)."""
    return f"ema-{average:g}" if average >= 1 else f"power-{average:g}"
