"""Kernel distances between two sets of features: KID and CMMD. Unlike FID they assume no Gaussian."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

KID_SEED = 2020  # torch-fidelity's, which gives the same subsets
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
BLOCK = 4096  # rows of features compared at once


def kid(
    generated: Tensor, real: Tensor, subsets: int = 100, size: int = 1000, seed: int = KID_SEED
) -> tuple[float, float]:
    """Kernel inception distance (Binkowski et al. 2018): mean and standard deviation, over subsets of `size` images of
    each side, of the unbiased squared MMD with the kernel (x.y / E + 1)^3.

    generated (N, E), real (M, E): features of any dtype, used in float64. Subsets are torch-fidelity's; clean-fid
    has the same formula and other subsets. `size` is reduced to the smaller number of images. KID is unbiased, so it
    may be below zero, and figures of different N can be compared.
    """
    size = min(size, len(generated), len(real))
    assert size >= 2, f"KID needs two images on each side, not {size}"
    x_NE, y_ME = generated.double(), real.double()
    draw = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        x = x_NE[draw.choice(len(x_NE), size, replace=False)]
        y = y_ME[draw.choice(len(y_ME), size, replace=False)]
        xx, yy, xy = _cubic(x, x), _cubic(y, y), _cubic(x, y)
        within = xx.sum() - xx.trace() + yy.sum() - yy.trace()
        values.append(float(within / (size * (size - 1)) - 2 * xy.mean()))
    return float(np.mean(values)), float(np.std(values))


def _cubic(x_NE: Tensor, y_ME: Tensor) -> Tensor:
    """KID's kernel: (N, M)."""
    return (x_NE @ y_ME.T / x_NE.shape[1] + 1).pow_(3)


def cmmd(generated: Tensor, real: Tensor) -> float:
    """CLIP maximum mean discrepancy (Jayasumana et al. 2024): 1000 times the squared MMD with a Gaussian kernel of
    sigma 10 between normalised CLIP embeddings (N, E) and (M, E).

    The estimator is that of the authors' code: means over all pairs, including pairs of an image with itself. Memory:
    one block.
    """
    x, y = (F.normalize(side.double(), dim=1) for side in (generated, real))
    return CMMD_SCALE * (_gaussian_mean(x, x) + _gaussian_mean(y, y) - 2 * _gaussian_mean(x, y))


def _gaussian_mean(x_NE: Tensor, y_ME: Tensor) -> float:
    """Mean of the Gaussian kernel over all pairs."""
    total = 0.0
    for x in x_NE.split(BLOCK):
        for y in y_ME.split(BLOCK):
            squares = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T
            total += float(torch.exp(-squares / (2 * CMMD_SIGMA**2)).sum())
    return total / (len(x_NE) * len(y_ME))
