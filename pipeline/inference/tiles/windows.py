"""Overlapping windows that cover a picture, and weights that blend what is made in them.

Windows have one side, begin at multiples of a unit and are spread evenly, so that the last one ends where the picture
ends. A window's weight rises smoothly over what it shares with its neighbour; at every position the weights of all
windows sum to 1, and no weight is 0.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Window:
    """A window of a picture or a latent, in its positions.

    rows, columns: weights along both axes, (height,) and (width,) float32 on the CPU. core: the part of the window, as
    (top, left, bottom, right), that lies nearer to its middle than to that of any other: cores do not overlap and cover
    everything.
    """

    top: int
    left: int
    rows: Tensor
    columns: Tensor
    core: tuple[int, int, int, int]

    @property
    def height(self) -> int:
        return len(self.rows)

    @property
    def width(self) -> int:
        return len(self.columns)

    def of(self, x: Tensor) -> Tensor:
        """The window of (..., H, W), a view."""
        return x[..., self.top : self.top + self.height, self.left : self.left + self.width]

    def weight(self, like: Tensor) -> Tensor:
        """Weights (height, width) float32, on the device of `like`."""
        return (self.rows[:, None] * self.columns).to(like.device)

    def add(self, out: Tensor, made: Tensor) -> None:
        """Add what was made in the window, (..., height, width), to `out` (..., H, W) float32."""
        self.of(out).addcmul_(made.to(out.device, torch.float32), self.weight(out))

    def times(self, factor: int) -> tuple[int, int, int, int]:
        """top, left, bottom and right on a grid that is `factor` times as fine."""
        return (
            self.top * factor,
            self.left * factor,
            (self.top + self.height) * factor,
            (self.left + self.width) * factor,
        )


def windows(height: int, width: int, side: int, overlap: int, unit: int = 1) -> list[Window]:
    """Windows of at most `side` x `side` that cover height x width, row by row.

    overlap: positions that neighbours share at least, less than `side`. unit: all lengths are multiples of it, and so
    is where windows begin. Along an axis that is no longer than `side` there is one window.
    """
    rows, columns = (_along(length, side, overlap, unit) for length in (height, width))
    return [
        Window(top, left, rise, run, (above, before, below, after))
        for top, rise, (above, below) in rows
        for left, run, (before, after) in columns
    ]


def spans(length: int, side: int, overlap: int, unit: int = 1) -> list[int]:
    """Where windows of `side` begin along an axis, in rising order; the arguments are those of `windows`."""
    assert all(n % unit == 0 for n in (length, side, overlap)), (length, side, overlap, unit)
    assert 0 <= overlap < side, (overlap, side)
    if side >= length:
        return [0]
    room, step = (length - side) // unit, (side - overlap) // unit
    count = -(-room // step)  # of windows after the first
    return [i * room // count * unit for i in range(count + 1)]


def ramps(length: int, side: int, starts: Sequence[int]) -> list[Tensor]:
    """The weights of each window along an axis, (side,) float32 each: a cubic ramp over what it shares with each
    neighbour, divided by the sum over all windows."""
    side = min(side, length)
    weights = []
    for i, start in enumerate(starts):
        weight = torch.ones(side, dtype=torch.float64)
        if i > 0 and (shared := starts[i - 1] + side - start) > 0:
            weight[:shared] *= _ramp(shared)
        if i + 1 < len(starts) and (shared := start + side - starts[i + 1]) > 0:
            weight[-shared:] *= _ramp(shared).flip(0)
        weights.append(weight)
    total = torch.zeros(length, dtype=torch.float64)
    for start, weight in zip(starts, weights, strict=True):
        total[start : start + side] += weight
    return [(w / total[start : start + side]).float() for start, w in zip(starts, weights, strict=True)]


def borders(length: int, side: int, starts: Sequence[int]) -> list[int]:
    """Positions before which a window begins or ends, inside of the axis."""
    side = min(side, length)
    return sorted({edge for start in starts for edge in (start, start + side) if 0 < edge < length})


def _ramp(positions: int) -> Tensor:
    """3 t^2 - 2 t^3 at the middles of `positions` equal parts of [0, 1]."""
    t = (torch.arange(positions, dtype=torch.float64) + 0.5) / positions
    return t * t * (3 - 2 * t)


def _along(length: int, side: int, overlap: int, unit: int) -> list[tuple[int, Tensor, tuple[int, int]]]:
    """Start, weights and core (relative to the start) of each window along an axis."""
    starts = spans(length, side, overlap, unit)
    side = min(side, length)
    cuts = [0, *((second + first + side) // 2 for first, second in itertools.pairwise(starts)), length]
    cores = [(low - start, high - start) for start, low, high in zip(starts, cuts[:-1], cuts[1:], strict=True)]
    return list(zip(starts, ramps(length, side, starts), cores, strict=True))
