"""FID from mergeable feature statistics, the Inception Score and the CLIP score.

Kernel distances are in kernels.py, precision and recall in manifold.py, error bars in error_bars.py. All of them
compute in float64 on features in the order of image numbers, so they do not depend on batches or ranks.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import NonFinite

BITS, SLICES = 12, 4
LARGEST = 2.0**BITS  # bound of a feature's magnitude; 4 x 12 bits below it give a grid of 2^-36


class RankDeficient(UserWarning):
    """A covariance was estimated from too few images to have full rank, which biases FID upwards even more."""


@dataclass(frozen=True)
class Gaussian:
    """Mean (E,) and unbiased covariance (E, E), float64, of the features of n images, which FID compares."""

    n: int
    mean: Tensor
    cov: Tensor


@dataclass
class Statistics:
    """Exact sums over feature vectors: the same bits for any distribution of the images over batches and ranks.

    Features are rounded to a grid of 2^-36, which holds all float32 of magnitude 2^-12 to 2^12, and cut into four
    integers of 12 bits. Products of two slices are integers below 2^25, so float64 sums a batch of them without
    rounding, and int64 sums of batches hold 2^25 images (after Ozaki et al. 2012, "Error-free transformations of matrix
    multiplication").

    n: number of images. totals (2, E): sums of the slices, slice s in units of 2^(-12 s), two slices per number.
    outers (4, E, E): sums of products of slices s and t, in units of 2^(-12 (s + t)), two levels s + t per number.
    Both are int64 on the CPU: number k is in units of 2^(-24 k - 12).
    """

    n: int
    totals: Tensor
    outers: Tensor

    @classmethod
    def empty(cls, width: int) -> Statistics:
        return cls(
            0,
            torch.zeros(SLICES // 2, width, dtype=torch.int64),
            torch.zeros(SLICES, width, width, dtype=torch.int64),
        )

    @classmethod
    def of(cls, features: Tensor) -> Statistics:
        """Statistics of features (N, E) of any float dtype."""
        statistics = cls.empty(features.shape[1])
        statistics.add(features)
        return statistics

    def add(self, features: Tensor) -> None:
        """Add the features (N, E) of N images. Raises NonFinite for a feature whose magnitude is not below 4096."""
        rest_NE = features.detach().to("cpu", torch.float64)
        if not bool((rest_NE.abs() < LARGEST).all()):
            raise NonFinite(
                "a feature of a picture is not finite, or not below 4096 in size: FID has no meaning for it"
            )
        self.n += len(rest_NE)
        slices = []
        for s in range(SLICES):
            part = rest_NE.mul(2.0 ** (BITS * s)).round_()
            rest_NE = rest_NE - part * 2.0 ** (-BITS * s)
            slices.append(part)
            _count(self.totals, s, part.sum(0))
        for s, first in enumerate(slices):
            for t in range(s, SLICES):
                product = first.T @ slices[t]
                _count(self.outers, s + t, product if s == t else product + product.T)

    @classmethod
    def merge(cls, parts: Iterable[Statistics]) -> Statistics:
        """Statistics of the images of all parts. They do not depend on the parts or their order."""
        parts = list(parts)
        return cls(
            sum(part.n for part in parts),
            torch.stack([part.totals for part in parts]).sum(0),
            torch.stack([part.outers for part in parts]).sum(0),
        )

    def gaussian(self) -> Gaussian:
        """Mean and unbiased covariance (divisor n - 1, as in numpy.cov and the published FID code)."""
        assert self.n >= 2, f"a covariance needs two images, not {self.n}"
        total, outer = _scaled(self.totals), _scaled(self.outers)
        mean = total / self.n
        cov = (outer - self.n * torch.outer(mean, mean)) / (self.n - 1)
        return Gaussian(self.n, mean, (cov + cov.T) / 2)


def _count(levels: Tensor, level: int, sums: Tensor) -> None:
    """Add integers in units of 2^(-12 level) to the number that holds this level."""
    levels[level // 2] += sums.long() * (1 if level % 2 else 2**BITS)


def _scaled(levels: Tensor) -> Tensor:
    """The sum of all levels in float64, from the smallest unit to the largest."""
    total = torch.zeros_like(levels[0], dtype=torch.float64)
    for k in reversed(range(len(levels))):
        total += levels[k].double() * 2.0 ** (-BITS * (2 * k + 1))
    return total


# --------------------------------------------------------------------------------------------------------------------
# Frechet distance


def fid(a: Gaussian, b: Gaussian) -> float:
    """Frechet inception distance (Heusel et al. 2017, equation 6) between two Gaussians, with any feature network.

    |m_a - m_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2). The symmetric form has real, non-negative eigenvalues, so no
    general matrix root with its imaginary residue is needed. Eigenvalues below zero are rounding and count as zero.
    FID is larger for fewer images. Warns RankDeficient when either side has at most E images.
    """
    for side in (a, b):
        warn_of_rank(side.n, len(a.mean))
    return frechet(a, b, symmetric_root(a.cov))


def warn_of_rank(images: int, width: int) -> None:
    """Warns RankDeficient when there are too few images for a covariance of full rank."""
    if images <= width:
        warnings.warn(
            f"FID from {images} images with features of width {width}: the covariance is rank deficient; compare only "
            "with figures of the same number of images",
            RankDeficient,
            stacklevel=3,
        )


def frechet(a: Gaussian, b: Gaussian, root_a: Tensor) -> float:
    """`fid` with the root of a's covariance, which is computed once for many b."""
    eigenvalues = torch.linalg.eigvalsh(root_a @ b.cov @ root_a)
    cross = eigenvalues.clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * cross
    return max(float(distance), 0.0)


def symmetric_root(matrix: Tensor) -> Tensor:
    """Square root of a symmetric positive semi-definite matrix (E, E)."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


# --------------------------------------------------------------------------------------------------------------------
# Figures without a reference


def inception_score(features: Tensor, classes: Tensor, splits: int = 10, seed: int = 2020) -> tuple[float, float]:
    """Mean and standard deviation over `splits` of exp E KL(p(y|x) || p(y)) (Salimans et al. 2016).

    features (N, E), classes (K, E): logits are their product without a bias, as in the original and in torch-fidelity,
    whose shuffle is used too. The score is larger for more images.
    """
    order = np.random.RandomState(seed).permutation(len(features))
    logits_NK = features[order].double() @ classes.double().T
    log_p_NK = logits_NK.log_softmax(1)
    n, scores = len(log_p_NK), []
    for i in range(splits):
        log_p = log_p_NK[i * n // splits : (i + 1) * n // splits]
        p = log_p.exp()
        scores.append(float((p * (log_p - p.mean(0).log())).sum(1).mean().exp()))
    return float(np.mean(scores)), float(np.std(scores))


def clip_similarity(image: Tensor, text: Tensor) -> Tensor:
    """100 x cosine between image (N, E) and text embeddings (N, E), one per pair: (N,) float64 in [-100, 100].

    Their mean is the CLIP score as torchmetrics scales it; Hessel et al. 2021 multiply the cosine by 2.5 instead.
    """
    image, text = image.double(), text.double()
    return 100 * torch.nn.functional.cosine_similarity(image, text, dim=-1, eps=1e-12)
