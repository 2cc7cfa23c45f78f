"""Figures that say how good samples are: FID from mergeable feature statistics, and the CLIP score.

Sums are kept in float64, so statistics of parts add up to those of the whole, whatever the batches and ranks were.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


class RankDeficient(UserWarning):
    """A covariance was estimated from too few images to have full rank; FID is then biased upwards all the more."""


@dataclass(frozen=True)
class Gaussian:
    """What FID compares: the mean (E,) and unbiased covariance (E, E), both float64, of the features of n images."""

    n: int
    mean: Tensor
    cov: Tensor


@dataclass
class Statistics:
    """Sums over feature vectors, which add exactly across batches and ranks (to the rounding of float64).

    n: number of images; total (E,): sum of features; outer (E, E): sum of their outer products; float64 on the CPU.
    """

    n: int
    total: Tensor
    outer: Tensor

    @classmethod
    def empty(cls, width: int) -> Statistics:
        return cls(0, torch.zeros(width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64))

    @classmethod
    def of(cls, features: Tensor) -> Statistics:
        """Statistics of features (N, E) of any float dtype."""
        statistics = cls.empty(features.shape[1])
        statistics.add(features)
        return statistics

    def add(self, features: Tensor) -> None:
        """Count the features (N, E) of N more images."""
        x_NE = features.detach().to("cpu", torch.float64)
        self.n += len(x_NE)
        self.total += x_NE.sum(0)
        self.outer += x_NE.T @ x_NE

    @classmethod
    def merge(cls, parts: Iterable[Statistics]) -> Statistics:
        """Statistics of all images of the parts together."""
        parts = list(parts)
        return cls(
            sum(part.n for part in parts),
            torch.stack([part.total for part in parts]).sum(0),
            torch.stack([part.outer for part in parts]).sum(0),
        )

    def gaussian(self) -> Gaussian:
        """Mean and unbiased covariance (divisor n - 1, as numpy.cov and the published FID codes have it)."""
        assert self.n >= 2, f"a covariance needs two images, not {self.n}"
        mean = self.total / self.n
        cov = (self.outer - self.n * torch.outer(mean, mean)) / (self.n - 1)
        return Gaussian(self.n, mean, (cov + cov.T) / 2)


def fid(a: Gaussian, b: Gaussian) -> float:
    """Frechet inception distance (Heusel et al. 2017, equation 6) between two Gaussians, with any feature network.

    |m_a - m_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2). The symmetric form has real, non-negative eigenvalues, so no
    general matrix root with its imaginary residue is needed; eigenvalues below zero are rounding and count as zero.
    Depends on the number of images: fewer give more. Warns RankDeficient when either side has no more than E of them.
    """
    width = len(a.mean)
    for side in (a, b):
        if side.n <= width:
            warnings.warn(
                f"FID from {side.n} images with features of width {width}: the covariance is rank deficient; compare "
                "only with figures of the same number of images",
                RankDeficient,
                stacklevel=2,
            )
    root_a = _symmetric_root(a.cov)
    eigenvalues = torch.linalg.eigvalsh(root_a @ b.cov @ root_a)
    cross = eigenvalues.clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * cross
    return max(float(distance), 0.0)


def _symmetric_root(matrix: Tensor) -> Tensor:
    """Square root of a symmetric positive semi-definite matrix (E, E)."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def clip_similarity(image: Tensor, text: Tensor) -> Tensor:
    """100 x cosine between image (N, E) and text embeddings (N, E), one per pair: (N,) float64 in [-100, 100].

    Their mean is the CLIP score as torchmetrics scales it; Hessel et al. 2021 multiply the cosine by 2.5 instead.
    """
    image, text = image.double(), text.double()
    return 100 * torch.nn.functional.cosine_similarity(image, text, dim=-1, eps=1e-12)
