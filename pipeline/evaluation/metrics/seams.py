"""Whether tiles can be seen: how much pictures change across the borders of tiles, beside how much elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Jump:
    """Mean absolute difference of neighbouring pixels, in levels of 255: across borders, and of all other
    neighbours."""

    across: float
    elsewhere: float

    @property
    def ratio(self) -> float:
        """The first over the second; 1 where borders cannot be told from the rest. NaN for flat pictures."""
        return self.across / self.elsewhere if self.elsewhere else float("nan")


def jump(pictures: np.ndarray, rows: Sequence[int], columns: Sequence[int]) -> Jump:
    """The jump of pictures (n, H, W, C) uint8 or float. rows, columns: a border lies before each of them, from 1 to
    H - 1 or W - 1."""
    across, elsewhere = [], []
    for axis, borders in ((1, rows), (2, columns)):
        changes = np.abs(np.diff(pictures.astype(np.float64), axis=axis))
        at = np.zeros(changes.shape[axis], bool)
        at[[border - 1 for border in borders]] = True
        across.append(np.compress(at, changes, axis).ravel())
        elsewhere.append(np.compress(~at, changes, axis).ravel())
    joined = [np.concatenate(parts) for parts in (across, elsewhere)]
    return Jump(*(float(part.mean()) if part.size else float("nan") for part in joined))
