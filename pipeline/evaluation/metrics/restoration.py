"""How near a picture is to another: PSNR and SSIM."""

from __future__ import annotations

import math

import numpy as np
from scipy import ndimage

MOST_DB = 100.0
"""PSNR of equal pictures, which has no bound otherwise."""
WINDOW, SIGMA = 11, 1.5
"""Pixels of SSIM's window along a side, and the standard deviation of its weights (Wang et al. 2004, section III.C)."""
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def squared_error(a: np.ndarray, b: np.ndarray, where: np.ndarray | None = None) -> tuple[float, int]:
    """Sum of squared differences in levels between two pictures (H, W, 3) uint8, and the number of values compared.

    where: (H, W) bool, the pixels to compare; all by default.
    """
    differences = a.astype(np.float64) - b
    if where is not None:
        differences = differences[where]
    return float(np.square(differences).sum()), differences.size


def psnr(error: float, count: int) -> float | None:
    """Peak signal-to-noise ratio in dB of 8-bit values whose squared differences sum to `error`, at most MOST_DB; None
    for no values.

    Of several pictures the errors are summed before the logarithm is taken: inside holes, the mean of pictures' own
    PSNRs is that of the flat ones.
    """
    if not count:
        return None
    return MOST_DB if error <= 0 else min(10 * math.log10(255.0**2 * count / error), MOST_DB)


def ssim(a: np.ndarray, b: np.ndarray) -> float | None:
    """Structural similarity (Wang et al. 2004, equation 13) of two pictures (H, W, 3) uint8: the mean over channels and
    over the positions where the window lies inside; None where it does not fit."""
    if min(a.shape[:2]) < WINDOW:
        return None
    x, y = a.astype(np.float64), b.astype(np.float64)
    mean_x, mean_y = _smooth(x), _smooth(y)
    var_x, var_y = _smooth(x * x) - mean_x**2, _smooth(y * y) - mean_y**2
    covariance = _smooth(x * y) - mean_x * mean_y
    similarity = ((2 * mean_x * mean_y + C1) * (2 * covariance + C2)) / (
        (mean_x**2 + mean_y**2 + C1) * (var_x + var_y + C2)
    )
    rim = WINDOW // 2
    return float(similarity[rim:-rim, rim:-rim].mean())


def _smooth(x: np.ndarray) -> np.ndarray:
    """Weighted means over SSIM's window, by rows and columns."""
    offsets = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-(offsets**2) / (2 * SIGMA**2))
    weights /= weights.sum()
    return ndimage.correlate1d(ndimage.correlate1d(x, weights, axis=0), weights, axis=1)
