"""FID against closed forms and an independent computation, and what its statistics promise."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
import warnings
from fractions import Fraction

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from pipeline.errors import NonFinite
from pipeline.evaluation.metrics import kernels, manifold
from pipeline.evaluation.metrics.fid import Gaussian, RankDeficient, Statistics, clip_similarity, fid, inception_score
from pipeline.evaluation.metrics.kernels import cmmd, kid
from pipeline.evaluation.metrics.manifold import precision_recall


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


# --------------------------------------------------------------------------------------------------------------------
# Sums are exact


def test_sums_are_bit_equal_however_images_are_spread() -> None:
    """Over batches of any size, ranks of any number, in any order: what float64 sums alone are not."""
    x = features(999, 24, shift=2.0).float()
    whole = Statistics.of(x)
    generator = torch.Generator().manual_seed(5)
    for size in (1, 7, 64, 998):
        shuffled = x[torch.randperm(len(x), generator=generator)]
        ranks = [Statistics.empty(24) for _ in range(3)]
        for i, batch in enumerate(shuffled.split(size)):
            ranks[i % 3].add(batch)
        merged = Statistics.merge(ranks)
        assert torch.equal(merged.totals, whole.totals) and torch.equal(merged.outers, whole.outers)
        assert torch.equal(merged.gaussian().cov, whole.gaussian().cov)
    halves = x[:500].double(), x[500:].double()
    assert not torch.equal(halves[0].T @ halves[0] + halves[1].T @ halves[1], x.double().T @ x.double())


def test_sums_of_floats_are_those_of_exact_arithmetic() -> None:
    x = torch.tensor([[1 + 2.0**-23, -3.7], [1e-3, 4095.5], [2.0**-36, -(2.0**-12) - 2.0**-35]], dtype=torch.float32)
    rows = [[Fraction(float(v)) for v in row] for row in x]
    gaussian = Statistics.of(x).gaussian()
    for i in range(2):
        mean = sum(row[i] for row in rows) / 3
        assert float(gaussian.mean[i]) == pytest.approx(float(mean), rel=1e-15)
        for j in range(2):
            other = sum(row[j] for row in rows) / 3
            cov = sum((row[i] - mean) * (row[j] - other) for row in rows) / 2
            assert float(gaussian.cov[i, j]) == pytest.approx(float(cov), rel=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -4096.0])
def test_features_without_meaning_are_refused(bad: float) -> None:
    with pytest.raises(NonFinite, match="4096"):
        Statistics.of(torch.tensor([[0.0, bad], [1.0, 2.0]]))


# --------------------------------------------------------------------------------------------------------------------
# KID, CMMD, Inception Score, precision and recall, against their definitions written out


def test_kid_of_all_images_is_the_unbiased_mmd() -> None:
    x, y = features(12, 5, 1).float(), features(12, 5, 2, shift=0.5).float()

    def kernel(a: Tensor, b: Tensor) -> float:
        return float((a.double() @ b.double() / 5 + 1) ** 3)

    within = sum(kernel(s[i], s[j]) for s in (x, y) for i in range(12) for j in range(12) if i != j) / (12 * 11)
    across = sum(kernel(a, b) for a in x for b in y) / 144
    mean, std = kid(x, y, subsets=3, size=1000)
    assert mean == pytest.approx(within - 2 * across, rel=1e-12) and std == pytest.approx(0, abs=1e-12)


def test_kid_is_about_zero_for_one_distribution_and_says_how_far_it_scatters() -> None:
    x = features(800, 16, 1)
    mean, std = kid(x[:400], x[400:], subsets=50, size=100)
    apart, _ = kid(x[:400], x[400:] + 0.5, subsets=50, size=100)
    assert abs(mean) < 2 * std and apart > 10 * std


def test_cmmd_is_the_authors_formula_in_any_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = features(30, 6, 1).float(), features(25, 6, 2, shift=1.0).float()
    x_n, y_n = (s.double() / s.double().norm(dim=1, keepdim=True) for s in (x, y))

    def mean(a: Tensor, b: Tensor) -> float:
        return float(torch.exp(-((a[:, None] - b) ** 2).sum(-1) / 200).mean())

    expected = 1000 * (mean(x_n, x_n) + mean(y_n, y_n) - 2 * mean(x_n, y_n))
    assert cmmd(x, y) == pytest.approx(expected, rel=1e-9) and expected > 0.1
    monkeypatch.setattr(kernels, "BLOCK", 7)
    assert cmmd(x, y) == pytest.approx(expected, rel=1e-9)


def test_inception_score_of_certain_and_even_classes_is_their_number() -> None:
    classes = 100 * torch.eye(8)
    certain = torch.eye(8).repeat(50, 1)
    score, std = inception_score(certain, classes, splits=1)
    assert score == pytest.approx(8, rel=1e-12) and std == 0
    assert inception_score(torch.ones(40, 8), classes, splits=4)[0] == pytest.approx(1, rel=1e-12)


def brute_force(x: np.ndarray, y: np.ndarray, k: int) -> float:
    """The share of x inside the neighbourhoods of y, pair by pair."""
    radii = [sorted(math.dist(a, b) for j, b in enumerate(y) if j != i)[k - 1] for i, a in enumerate(y)]
    return float(np.mean([any(math.dist(a, b) <= r for b, r in zip(y, radii)) for a in x]))


@pytest.mark.parametrize("block", [5, 16, 2048])
def test_precision_and_recall_are_the_brute_force_ones(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = features(60, 3, 1, shift=0.4).float(), features(45, 3, 2, scale=2).float()
    x[3] = x[4]  # one twice, and one in both sets
    x[5] = y[6]
    monkeypatch.setattr(manifold, "BLOCK", block)
    found = precision_recall(x, y)
    expected = brute_force(x.double().numpy(), y.double().numpy(), 3), brute_force(y.numpy(), x.numpy(), 3)
    assert found == pytest.approx(expected, abs=0) and 0.1 < min(found) < max(found) < 1


def test_precision_and_recall_are_bounded_in_memory() -> None:
    """10,000 against 10,000 in pieces: all their distances at once would be 800 MB."""
    command = "import resource, sys; sys.path.insert(0, 'tests/evaluation'); from test_fid import features\n"
    command += "from pipeline.evaluation.metrics.manifold import precision_recall\n"
    command += "x = features(20_000, 4, 1)\n"
    command += "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
    command += "found = precision_recall(x[:10_000], x[10_000:])\n"
    command += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, *found)"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    grown, precision, recall = (float(word) for word in done.stdout.split())
    assert grown < 300_000 and 0.5 < precision < 1 and 0.5 < recall < 1
