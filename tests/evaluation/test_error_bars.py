"""Error bars are as wide as repeating the experiment shows, and FID-infinity is FID without its bias."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.evaluation.metrics.error_bars import FrechetTo, fid_infinity, half_sample_error, wilson
from pipeline.evaluation.metrics.fid import Gaussian, Statistics, fid

WIDTH, IMAGES, REPEATS = 16, 400, 24


def reference(width: int = WIDTH) -> Gaussian:
    return Gaussian(10**6, torch.zeros(width, dtype=torch.float64), torch.eye(width, dtype=torch.float64))


@pytest.fixture(scope="module")
def world() -> tuple[float, list[Tensor]]:
    """The true distance of a distribution from the reference, and independent sets of images of it."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.eye(WIDTH) + 0.3 * torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    truth = fid(Gaussian(10**6, torch.full((WIDTH,), 0.1, dtype=torch.float64), mixing.T @ mixing), reference())
    noise = torch.randn(REPEATS, IMAGES, WIDTH, generator=generator, dtype=torch.float64)
    return truth, list(noise @ mixing + 0.1)


def test_the_error_of_fid_is_what_repeating_it_shows(world: tuple[float, list[Tensor]]) -> None:
    distance = FrechetTo(reference())
    values = [distance(x) for x in world[1]]

    def error(x: Tensor) -> float:
        return half_sample_error(IMAGES, lambda numbers: distance(x[numbers]))

    errors = [error(x) for x in world[1]]
    assert np.mean(errors) == pytest.approx(np.std(values, ddof=1), rel=0.35)  # 24 repeats know it to 15%


def test_the_error_of_fid_infinity_is_what_repeating_it_shows(world: tuple[float, list[Tensor]]) -> None:
    truth, sets = world
    found = [fid_infinity(x, reference()) for x in sets]
    scatter = float(np.std([one.value for one in found], ddof=1))
    assert np.mean([one.error for one in found]) == pytest.approx(scatter, rel=0.4)
    assert np.mean([one.value for one in found]) == pytest.approx(truth, abs=3 * scatter / math.sqrt(REPEATS))


def test_fid_infinity_has_no_bias_where_fid_has() -> None:
    """Images of the reference's own distribution, whose true distance is 0: the error bar is too wide there, not too
    narrow, since FID then scatters as 1 / N."""
    images = 4 * IMAGES
    generator = torch.Generator().manual_seed(0)
    sets = torch.randn(REPEATS, images, WIDTH, generator=generator, dtype=torch.float64)
    distance = FrechetTo(reference())
    plain = [distance(x) for x in sets]
    found = [fid_infinity(x, reference()) for x in sets]
    values = [one.value for one in found]
    assert min(plain) > 0.04 and abs(np.mean(values)) < np.mean(plain) / 10
    assert np.std(values) < np.mean([one.error for one in found]) < 3 * np.std(values)


def test_few_images_have_the_fid_of_the_full_matrix() -> None:
    x = torch.randn(60, 200, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wide = Gaussian(
        1000, torch.full((200,), 0.3, dtype=torch.float64), torch.diag(torch.linspace(0.1, 3, 200).double())
    )
    with pytest.warns(UserWarning, match="rank deficient"):
        expected = fid(Statistics.of(x).gaussian(), wide)
    assert FrechetTo(wide)(x) == pytest.approx(expected, rel=1e-6)


def test_errors_are_the_same_each_time() -> None:
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(1))
    assert fid_infinity(x, reference(4)) == fid_infinity(x, reference(4))


@pytest.mark.parametrize(
    ("right", "of", "low", "high"),
    [(0, 10, 0.0, 0.27753), (10, 10, 0.72247, 1.0), (81, 263, 0.25529, 0.36621), (0, 0, 0.0, 1.0)],
)
def test_wilsons_interval_has_its_published_values(right: int, of: int, low: float, high: float) -> None:
    """The third is Newcombe's (1998), table I."""
    assert wilson(right, of) == pytest.approx((low, high), abs=6e-6)
