"""How much figures vary between draws of images: standard errors, intervals, and FID without its bias."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.evaluation.metrics.fid import Gaussian, frechet, symmetric_root

DRAWS = 16
"""Half-samples per error bar, which is itself uncertain by about 1 / sqrt(2 x 15) = 18%."""
POINTS = 10
"""Numbers of images to which FID-infinity's line is fitted."""
Z95 = 1.959963984540054
"""Half the width of a normal's central 95%, in standard deviations."""


def wilson(right: int, of: int) -> tuple[float, float]:
    """95% interval of a share, `right` out of `of` (Wilson 1927). Unlike share +- error it is valid near 0 and 1."""
    if of == 0:
        return 0.0, 1.0
    share, z2 = right / of, Z95**2
    middle = (share + z2 / (2 * of)) / (1 + z2 / of)
    half = Z95 / (1 + z2 / of) * math.sqrt(share * (1 - share) / of + z2 / (4 * of**2))
    return max(middle - half, 0.0) if right else 0.0, min(middle + half, 1.0) if right < of else 1.0


def half_sample_error(n: int, figure: Callable[[Tensor], float], seed: int = 0, draws: int = DRAWS) -> float:
    """Standard error of a figure of n images: its standard deviation over random halves of them.

    figure: function of image numbers. Halves are drawn without replacement: a statistic of m out of n images
    scatters about that of all n with variance s^2 (1/m - 1/n), which is s^2 / n for a half (Politis & Romano 1994). A
    bootstrap with replacement repeats images, which narrows covariances and so pushes FID up.
    """
    draw = np.random.RandomState(seed)
    values = [figure(torch.from_numpy(draw.permutation(n)[: n // 2])) for _ in range(draws)]
    return float(np.std(values, ddof=1))


class FrechetTo:
    """FID of sets of features against one reference, whose matrix root is computed once."""

    def __init__(self, reference: Gaussian) -> None:
        self.reference, self.root = reference, symmetric_root(reference.cov)

    def __call__(self, features: Tensor) -> float:
        """FID of features (N, E). For N <= E the eigenvalues are those of an (N, N) matrix."""
        x_NE = features.double()
        mean = x_NE.mean(0)
        centred = (x_NE - mean) / math.sqrt(len(x_NE) - 1)
        if len(x_NE) > x_NE.shape[1]:
            return frechet(self.reference, Gaussian(len(x_NE), mean, centred.T @ centred), self.root)
        values = torch.linalg.eigvalsh(centred @ self.reference.cov @ centred.T).clamp(min=0)
        traces = self.reference.cov.trace() + centred.square().sum()
        return max(float((mean - self.reference.mean).square().sum() + traces - 2 * values.sqrt().sum()), 0.0)


@dataclass(frozen=True)
class Extrapolated:
    """FID-infinity and its standard error."""

    value: float
    error: float


def fid_infinity(features: Tensor, reference: Gaussian, seed: int = 0, points: int = POINTS) -> Extrapolated:
    """FID for infinitely many images (Chong & Forsyth 2020): FID's bias falls as 1 / N, so a line through FID at
    `points` numbers of images from N / 2 to N meets 1 / N = 0 without it.

    features: (N, E). Each point is the FID of a random subset. The error bar is half_sample_error of the whole
    extrapolation. Reliable where N / 2 exceeds E, so that covariances have full rank. The bias of the reference stays.
    """
    distance = FrechetTo(reference)

    def extrapolate(numbers: Tensor, draw: np.random.RandomState) -> float:
        sizes = np.linspace(len(numbers) / 2, len(numbers), points).astype(int)
        subsets = (numbers[torch.from_numpy(draw.permutation(len(numbers))[:size])] for size in sizes)
        _, value = np.polyfit(1 / sizes, [distance(features[subset]) for subset in subsets], 1)
        return float(value)

    draw = np.random.RandomState(seed)
    value = extrapolate(torch.arange(len(features)), draw)
    error = half_sample_error(len(features), lambda numbers: extrapolate(numbers, draw), seed + 1)
    return Extrapolated(value, error)
