"""FID against closed forms and an independent computation, and what its statistics promise."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from pipeline.evaluation.metrics import Gaussian, RankDeficient, Statistics, clip_similarity, fid


def features(n: int, width: int, seed: int = 0, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64) / math.sqrt(width)
    return scale * torch.randn(n, width, generator=generator, dtype=torch.float64) @ mixing + shift


def gaussian(mean: float, variance: float, width: int) -> Gaussian:
    cov = variance * torch.eye(width, dtype=torch.float64)
    return Gaussian(10_000, torch.full((width,), mean, dtype=torch.float64), cov)


def test_fid_of_isotropic_gaussians_is_the_closed_form() -> None:
    # E ((m_a - m_b)^2 + (s_a - s_b)^2), with standard deviations 2 and 3
    assert fid(gaussian(1.0, 4.0, 7), gaussian(-1.0, 9.0, 7)) == pytest.approx(7 * (4 + 1), rel=1e-12)


def test_fid_equals_the_general_matrix_root() -> None:
    a, b = features(500, 32, 1), features(400, 32, 2, scale=1.5, shift=0.3)
    ours = fid(Statistics.of(a).gaussian(), Statistics.of(b).gaussian())
    cov_a, cov_b = np.cov(a.numpy(), rowvar=False), np.cov(b.numpy(), rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    theirs = float(((a.mean(0) - b.mean(0)) ** 2).sum()) + np.trace(cov_a + cov_b - 2 * root)
    assert ours == pytest.approx(theirs, rel=1e-9)


def test_fid_is_symmetric_and_zero_for_the_same_images() -> None:
    a, b = (Statistics.of(features(300, 16, seed)).gaussian() for seed in (1, 2))
    assert fid(a, b) == pytest.approx(fid(b, a), rel=1e-9)
    assert fid(a, a) == pytest.approx(0.0, abs=1e-9)


def test_rank_deficiency_warns_and_stays_finite() -> None:
    full, few = Statistics.of(features(300, 16)).gaussian(), Statistics.of(features(8, 16, 3)).gaussian()
    with pytest.warns(RankDeficient, match="8 images"):
        value = fid(few, full)
    assert math.isfinite(value) and value > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fid(full, full)


def test_fewer_images_give_a_larger_fid() -> None:
    reference = Statistics.of(features(20_000, 8, 0)).gaussian()
    many = features(20_000, 8, 0)  # the same distribution: the mixing is the seed's
    values = [fid(Statistics.of(many[:n]).gaussian(), reference) for n in (50, 500, 5_000)]
    assert values[0] > values[1] > values[2]


@pytest.mark.parametrize("cuts", [(0, 1000), (0, 1, 999, 1000), (0, 333, 500, 1000)])
def test_statistics_of_parts_add_up_to_those_of_the_whole(cuts: tuple[int, ...]) -> None:
    x = features(1000, 12, shift=5.0)
    whole = Statistics.of(x).gaussian()
    parts = [Statistics.of(x[a:b]) for a, b in itertools.pairwise(cuts)]
    for order in (parts, parts[::-1]):
        merged = Statistics.merge(order).gaussian()
        assert merged.n == 1000
        torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(merged.cov, whole.cov, rtol=1e-11, atol=1e-11)


def test_covariance_is_numpys() -> None:
    x = features(50, 6, shift=100.0)
    expected = torch.from_numpy(np.cov(x.numpy(), rowvar=False))
    torch.testing.assert_close(Statistics.of(x).gaussian().cov, expected, rtol=1e-9, atol=1e-9)


def test_half_precision_features_are_summed_in_double() -> None:
    x = torch.full((4096, 3), 0.1, dtype=torch.float16)
    assert Statistics.of(x).gaussian().mean.tolist() == pytest.approx([float(x[0, 0])] * 3, rel=1e-12)


def test_clip_similarity_is_a_hundred_times_the_cosine() -> None:
    image = torch.tensor([[1.0, 0.0], [2.0, 2.0], [-3.0, 0.0]])
    text = torch.tensor([[5.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    assert clip_similarity(image, text).tolist() == pytest.approx([100.0, 100 / math.sqrt(2), -100.0])
