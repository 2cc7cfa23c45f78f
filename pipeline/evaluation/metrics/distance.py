"""How different pictures look: the perceptual distance of 8-bit pictures, batch by batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from pipeline.inference.pictures import from_uint8
from pipeline.models.perceptual.network import Perceptual

MOST_PIXELS = 1 << 18
"""Pixels whose features are held at once: with VGG they take 2 KB each."""


def distances(perceptual: Perceptual | None, a: np.ndarray, b: np.ndarray) -> Sequence[dict[str, float | None]]:
    """The distance of each picture of `a` to that of `b`, both (B, H, W, 3) uint8, under its figure's name; {} for each
    where there is no network."""
    if perceptual is None:
        return [{} for _ in a]
    found: list[float] = []
    together = max(1, MOST_PIXELS // (a.shape[1] * a.shape[2]))
    with torch.inference_mode():
        for first in range(0, len(a), together):
            x, y = (from_uint8(pictures[first : first + together]).to(perceptual.mean.device) for pictures in (a, b))
            found += perceptual.distance(x, y).tolist()
    return [{perceptual.figure.name: far} for far in found]
