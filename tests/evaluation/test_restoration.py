"""PSNR and SSIM against their definitions, written out."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipeline.evaluation.metrics.restoration import MOST_DB, psnr, squared_error, ssim


@pytest.fixture
def pair() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.RandomState(0)
    a = rng.randint(0, 256, (17, 14, 3)).astype(np.uint8)
    return a, np.clip(a + rng.normal(0, 25, a.shape), 0, 255).astype(np.uint8)


def test_psnr_is_of_the_mean_squared_difference_of_levels(pair: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = pair
    error, count = squared_error(a, b)
    mean = np.mean([(float(x) - float(y)) ** 2 for x, y in zip(a.ravel(), b.ravel())])
    assert count == a.size and psnr(error, count) == pytest.approx(10 * math.log10(255**2 / mean))
    black, white = np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 255, np.uint8)
    assert psnr(*squared_error(black, white)) == 0 == psnr(*squared_error(white, black))


def test_psnr_of_equal_pictures_is_finite_and_that_of_nothing_is_none(pair: tuple[np.ndarray, np.ndarray]) -> None:
    assert psnr(*squared_error(pair[0], pair[0])) == MOST_DB
    assert psnr(*squared_error(*pair, where=np.zeros(pair[0].shape[:2], bool))) is None


def test_errors_are_of_the_pixels_that_are_named(pair: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = pair
    where = np.zeros(a.shape[:2], bool)
    where[3, 5] = True
    assert squared_error(a, b, where) == (float(((a[3, 5].astype(float) - b[3, 5]) ** 2).sum()), 3)


def test_ssim_is_that_of_its_definition(pair: tuple[np.ndarray, np.ndarray]) -> None:
    """Wang et al. 2004, equations 13 to 16, window by window and channel by channel."""
    window = np.array([[math.exp(-(x**2 + y**2) / (2 * 1.5**2)) for x in range(-5, 6)] for y in range(-5, 6)])
    window /= window.sum()
    values = []
    for c in range(3):
        for top in range(17 - 10):
            for left in range(14 - 10):
                x, y = (p[top : top + 11, left : left + 11, c].astype(float) for p in pair)
                mean_x, mean_y = (window * x).sum(), (window * y).sum()
                var_x, var_y = (window * (x - mean_x) ** 2).sum(), (window * (y - mean_y) ** 2).sum()
                covariance = (window * (x - mean_x) * (y - mean_y)).sum()
                c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
                values.append(
                    (2 * mean_x * mean_y + c1)
                    * (2 * covariance + c2)
                    / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
                )
    assert ssim(*pair) == pytest.approx(np.mean(values), abs=1e-9)
    assert ssim(pair[0], pair[0]) == 1.0
    assert ssim(pair[0][:10], pair[1][:10]) is None  # the window does not fit
