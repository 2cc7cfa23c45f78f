"""Fits what a step takes, in parts that are never negative, to measured steps."""

from __future__ import annotations

from collections.abc import Sequence

ROUNDS = 2000
"""Rounds of coordinate descent; a problem of a few unknowns has converged after a hundred."""


def fitted(
    rows: Sequence[Sequence[float]],
    seconds: Sequence[float],
    prior: Sequence[float],
    trust: Sequence[float],
) -> list[float]:
    """Coefficients >= 0 with which the rows' sums come near the measured seconds.

    Minimizes the sum of ((row . x - seconds) / seconds)^2 over the rows, and of (trust (x - prior) scale)^2 over the
    coefficients, where scale is a coefficient's mean share of the seconds per unit: errors are relative, and a
    coefficient that the rows say little about stays near its prior. rows: an amount for each coefficient. Non-negative
    least squares by coordinate descent (Franc et al. 2005, "Sequential coordinate-wise algorithm for the NNLS
    problem").
    """
    count = len(prior)
    scaled = [[amount / measured for amount in row] for row, measured in zip(rows, seconds, strict=True)]
    means = [sum(row[i] for row in scaled) / len(scaled) for i in range(count)]
    normal = [[sum(row[i] * row[j] for row in scaled) for j in range(count)] for i in range(count)]
    target = [sum(row[i] for row in scaled) for i in range(count)]
    for i in range(count):
        weight = (trust[i] * means[i]) ** 2
        normal[i][i] += weight
        target[i] += weight * prior[i]
    x = list(prior)
    for _ in range(ROUNDS):
        for i in range(count):
            if normal[i][i]:
                gradient = sum(normal[i][j] * x[j] for j in range(count)) - target[i]
                x[i] = max(0.0, x[i] - gradient / normal[i][i])
    return x
