"""Pictures of many label maps side by side, judged map by map, and how far their background is one.

A scene of captioned shapes lies on one grey, drawn anew for each picture, which its label map does not tell. It is what
a model decides for a whole picture by itself, so it shows when that is decided, and how far it reaches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from benchmarks.latent_scale.plan import PIXELS
from pipeline.evaluation.metrics.error_bars import half_sample_error
from pipeline.evaluation.shapes.match import labels as compare
from pipeline.evaluation.shapes.match import mean_iou

RIM = 4
"""Pixels around objects that are not looked at for the background."""
FEWEST_PIXELS = 16
"""Of background, from which its grey is known."""
Row = Mapping[str, float]
Rows = list[list[Row]]
"""What is counted of each map of each picture."""


@dataclass(frozen=True)
class Arrangement:
    """Which maps lie side by side. numbers: of maps, (B, side, side) int."""

    name: str
    numbers: np.ndarray

    @property
    def side(self) -> int:
        return self.numbers.shape[1]

    def __len__(self) -> int:
        return len(self.numbers)

    def labels(self, labels_KHW: np.ndarray) -> np.ndarray:
        """The label maps of its pictures, (B, side h, side w)."""
        return np.stack([np.block([[labels_KHW[k] for k in row] for row in rows]) for rows in self.numbers.tolist()])


def mosaics(maps: int, side: int) -> Arrangement:
    """Each map once, in pictures of side x side different ones. `maps` is a multiple of side^2."""
    return Arrangement(str(PIXELS * side), np.arange(maps).reshape(-1, side, side))


def repeated(maps: int) -> Arrangement:
    """Each map four times side by side."""
    return Arrangement("repeated", np.arange(maps)[:, None, None].repeat(2, 1).repeat(2, 2))


def parts(pictures: np.ndarray, side: int) -> np.ndarray:
    """Pictures (B, side h, side w, ...) cut into side x side parts: (B, side^2, h, w, ...), in reading order."""
    count, height, width, *rest = pictures.shape
    h, w = height // side, width // side
    cut = pictures.reshape(count, side, h, side, w, *rest).swapaxes(2, 3)
    return cut.reshape(count, side * side, h, w, *rest)


def rows_of(pictures: np.ndarray, labels: np.ndarray, side: int) -> Rows:
    """Pictures (B, H, W, 3) uint8 and the maps that they were asked for (B, ...), map by map."""
    both = zip(parts(pictures, side), parts(labels, side), strict=True)
    return [[compare(*pair) for pair in zip(*cut, strict=True)] for cut in both]


def greys(pictures: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The background of each picture (B, H, W, 3) uint8, in levels of 255: the median over pixels and channels where
    its map (B, h, w) asks for none but background within RIM pixels. (B,) float64, NaN where that is nowhere."""
    found = np.full(len(pictures), np.nan)
    for i, (picture, asked) in enumerate(zip(pictures, labels, strict=True)):
        factor = picture.shape[0] // asked.shape[0]
        empty = (asked == 0).repeat(factor, 0).repeat(factor, 1)
        empty = ndimage.binary_erosion(empty, iterations=RIM, border_value=1)
        if empty.sum() >= FEWEST_PIXELS:
            found[i] = np.median(picture[empty])
    return found


def spread(pictures: np.ndarray, labels: np.ndarray) -> float:
    """How far the background differs between the four quarters of a picture: the root of the mean variance over
    pictures."""
    quarters, asked = parts(pictures, 2), parts(labels, 2)
    flat = greys(quarters.reshape(-1, *quarters.shape[2:]), asked.reshape(-1, *asked.shape[2:])).reshape(-1, 4)
    known = [values[np.isfinite(values)] for values in flat]
    variances = [float(np.var(values, ddof=1)) for values in known if len(values) > 1]
    return float(np.sqrt(np.mean(variances))) if variances else float("nan")


def figures(rows: Rows, alone: Rows, numbers: np.ndarray) -> dict[str, float]:
    """mIoU over the labels, and its retention: by how much it is that of the same maps drawn alone, each with its
    standard error over pictures. alone: rows of pictures of one map each, by the map's number. numbers: of the maps
    (B, side, side)."""
    flat = [[alone[k][0] for k in np.unique(maps).tolist()] for maps in numbers]
    together = [{"rows": own, "alone": other} for own, other in zip(rows, flat, strict=True)]

    def iou(which: Sequence[int], kind: str = "rows") -> float:
        value = mean_iou([row for i in which for row in together[i][kind]])
        return float("nan") if value is None else value

    def ratio(which: Sequence[int]) -> float:
        return iou(which) / iou(which, "alone") if iou(which, "alone") else float("nan")

    every = range(len(rows))
    return {
        "label_iou": iou(every),
        "label_iou_error": half_sample_error(len(rows), lambda which: iou(which.tolist())),
        "label_accuracy": float(np.mean([row["accuracy"] for own in rows for row in own])),
        "retention": ratio(every),
        "retention_error": half_sample_error(len(rows), lambda which: ratio(which.tolist())),
    }


def decided(greys_KB: np.ndarray) -> list[float]:
    """How far the backgrounds of each row (K, B) differ already: their variance over that of the last row. Pictures
    without a background are left out.

    Where rows are what an exact network predicts of more and more certain x, Var(E[grey | x]) is the part of the
    variance that x tells (law of total variance): of pure noise it predicts one middle grey for all pictures. How well
    rows correlate with the last says nothing, since a deterministic sampler decides all by its first noise."""
    known = greys_KB[:, np.isfinite(greys_KB).all(0)]
    last = float(np.var(known[-1]))
    return [float(np.var(row)) / last if last else 0.0 for row in known]
