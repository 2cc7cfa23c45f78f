"""Resizing and Gaussians of elementwise sums and products alone, in an order of our own, so that every machine rounds
them alike (BLAS, libm and vectorised reductions do not promise that).

Images are float32 (H, W, C).
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

Kernel = Literal["linear", "cubic", "area", "antialiased"]
KERNELS: tuple[Kernel, ...] = ("linear", "cubic", "area")
"""As OpenCV's INTER_LINEAR, INTER_CUBIC and INTER_AREA: the first two alias where an image becomes smaller, the third
is linear where it becomes larger."""
SHARP, SMOOTH = -0.75, -0.5
"""The parameter a of Keys' cubic: OpenCV's, and that of Pillow and MATLAB (antialiased)."""
FARTHEST = 80.0
"""Exponents beyond it count as this one."""
HALVINGS = 8
TERMS = 9


def resize(image: np.ndarray, size: tuple[int, int], kernel: Kernel) -> np.ndarray:
    """The image at `size` (height, width)."""
    for axis, many in enumerate(size):
        if many != image.shape[axis]:
            image = weighted(image, axis, *_taps(image.shape[axis], many, kernel))
    return image


def matrix(old: int, new: int, kernel: Kernel) -> np.ndarray:
    """What `resize` does along a side of `old` pixels that becomes one of `new`, as a matrix (new, old) float32: of
    rows it is matrix @ image, with the rounding of that product."""
    index, weights = _taps(old, new, kernel)
    whole = np.zeros((new, old), np.float32)
    np.add.at(whole, (np.arange(new)[:, None], index), weights.astype(np.float32))
    return whole


def weighted(image: np.ndarray, axis: int, index: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Along an axis, sums of weights times what lies at the index. index, weights: (out, taps)."""
    total: np.ndarray | None = None
    for tap in np.flatnonzero(weights.any(axis=0)).tolist():
        column = weights[:, tap].astype(np.float32)
        product = np.take(image, index[:, tap], axis=axis)
        product *= column[:, None, None] if axis == 0 else column[None, :, None]
        total = product if total is None else np.add(total, product, out=total)
    assert total is not None
    return total


def _taps(old: int, new: int, kernel: Kernel) -> tuple[np.ndarray, np.ndarray]:
    """What each of `new` pixels takes of a line of `old`: places and weights, (new, taps)."""
    if kernel == "area" and new < old:
        return _area(old, new)
    step = old / new
    centres = (np.arange(new) + 0.5) * step - 0.5
    wide = max(step, 1.0) if kernel == "antialiased" else 1.0
    reach = math.ceil((1 if kernel in ("linear", "area") else 2) * wide)
    places = np.floor(centres).astype(np.int64)[:, None] + np.arange(1 - reach, reach + 1)
    distances = np.abs(places - centres[:, None]) / wide
    if kernel in ("linear", "area"):
        weights = np.maximum(1 - distances, 0)
    else:
        weights = _cubic(distances, SMOOTH if kernel == "antialiased" else SHARP)
    sums = weights[:, 0].copy()
    for tap in range(1, weights.shape[1]):
        sums += weights[:, tap]
    index = symmetric(places, old) if kernel == "antialiased" else places.clip(0, old - 1)
    return index, weights / sums[:, None]


def _area(old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
    """The share of each old pixel that each new one covers, in whole numbers of 1 / new of an old pixel."""
    begins = np.arange(new) * old
    first = begins // new
    places = first[:, None] + np.arange(-(-old // new) + 1)
    low = np.maximum(places * new, begins[:, None])
    high = np.minimum((places + 1) * new, begins[:, None] + old)
    return places.clip(0, old - 1), np.maximum(high - low, 0) / old


def _cubic(distances: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic of distances of 0 or more, in pixels."""
    d = distances
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return np.where(d < 1, near, np.where(d < 2, far, 0.0))


def mirrored(places: np.ndarray, side: int) -> np.ndarray:
    """Places inside of a line that is mirrored at the middle of its first and last pixel: 2 1 | 0 1 2 | 1 0."""
    if side == 1:
        return np.zeros_like(places)
    inside = places % (2 * side - 2)
    return np.where(inside < side, inside, 2 * side - 2 - inside)


def symmetric(places: np.ndarray, side: int) -> np.ndarray:
    """Places inside of a line that is mirrored at its border: 1 0 | 0 1 2 | 2 1."""
    inside = places % (2 * side)
    return np.where(inside < side, inside, 2 * side - 1 - inside)


def gaussian(exponents: np.ndarray) -> np.ndarray:
    """float64 e^-x of numbers of 0 or more, over the largest of the results, to about 1e-9: a Taylor series of
    x / 256, squared eight times."""
    x = np.minimum(exponents - exponents.min(), FARTHEST) / 2.0**HALVINGS
    result = np.ones_like(x)
    for term in range(TERMS, 0, -1):
        result = 1 - result * x / term
    for _ in range(HALVINGS):
        result = result * result
    return result


def normalised(weights: np.ndarray) -> np.ndarray:
    """float32 weights over their sum."""
    return (weights / math.fsum(weights.ravel().tolist())).astype(np.float32)
