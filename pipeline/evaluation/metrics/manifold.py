"""Improved precision and recall (Kynkaanniemi et al. 2019): shares of images in the other set's neighbourhoods."""

from __future__ import annotations

import torch
from torch import Tensor

NEIGHBOURS = 3
BLOCK = 2048  # rows and columns of a block of distances: 32 MB


def precision_recall(generated: Tensor, real: Tensor, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """Precision: the share of generated images (N, E) that lie within the distance of some real image (M, E) to its
    `neighbours`-th neighbour among the real ones. Recall: the same with exchanged sets.

    Distances are Euclidean, in float64. Memory besides the features: a few blocks of 2048 x 2048 for any N and M.
    Both figures depend on N and M; the paper uses 50,000 of each.
    """
    assert min(len(generated), len(real)) > neighbours, "each set needs more images than neighbours"
    x, y = generated.double(), real.double()
    return _share_inside(x, y, _radii(y, neighbours)), _share_inside(y, x, _radii(x, neighbours))


def _radii(x_NE: Tensor, neighbours: int) -> Tensor:
    """Squared distance of each row to its k-th nearest neighbour among the other rows: (N,)."""
    radii = []
    for start in range(0, len(x_NE), BLOCK):
        rows = x_NE[start : start + BLOCK]
        nearest = torch.full((len(rows), neighbours), torch.inf, dtype=x_NE.dtype)
        for column in range(0, len(x_NE), BLOCK):
            squares = _squares(rows, x_NE[column : column + BLOCK])
            if column == start:
                squares.fill_diagonal_(torch.inf)
            nearest = torch.cat([nearest, squares], 1).topk(neighbours, largest=False).values
        radii.append(nearest[:, -1])
    return torch.cat(radii)


def _share_inside(x_NE: Tensor, y_ME: Tensor, radii_M: Tensor) -> float:
    """Share of rows of x within the radius of at least one row of y."""
    inside = 0
    for x in x_NE.split(BLOCK):
        is_inside = torch.zeros(len(x), dtype=torch.bool)
        for y, radii in zip(y_ME.split(BLOCK), radii_M.split(BLOCK), strict=True):
            is_inside |= (_squares(x, y) <= radii).any(1)
        inside += int(is_inside.sum())
    return inside / len(x_NE)


def _squares(x_NE: Tensor, y_ME: Tensor) -> Tensor:
    """Squared distances (N, M), clamped at 0."""
    return (x_NE.square().sum(1)[:, None] + y_ME.square().sum(1) - 2 * x_NE @ y_ME.T).clamp_(min=0)
