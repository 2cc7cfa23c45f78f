"""The boxes of all images, as columns: 49 bytes a box while they are read, 8 more once they are sorted by image."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

BLOCK = 1 << 20
"""Boxes that are worked on at a time."""
LARGEST = sys.float_info.max
FINE, UNREADABLE, EMPTY, OUTSIDE = range(4)
REASONS = {UNREADABLE: "box_unreadable", EMPTY: "box_empty", OUTSIDE: "box_outside"}
"""What may be wrong with a box: a number that is not finite; no width or no height; an edge outside of the image by
more than rounding explains."""


class BoxColumns:
    """Boxes in the order in which they are read. image, category: numbers of the format. group: 1 around several
    objects. edges: four numbers each, x0, y0, x1, y1 as fractions of the image (COCO: x, y, width, height in pixels
    until `to_fractions`)."""

    def __init__(self) -> None:
        self.image, self.category, self.group, self.edges = array("q"), array("q"), array("b"), array("d")

    def add(self, image: int, category: int, group: bool, edges: Sequence[float]) -> None:
        """Adds a box."""
        self.image.append(image)
        self.category.append(category)
        self.group.append(group)
        self.edges.extend(edges)

    def __len__(self) -> int:
        return len(self.image)

    @property
    def edges_N4(self) -> np.ndarray:
        """(N, 4) float64, the columns' own memory."""
        return np.frombuffer(self.edges, dtype=np.float64).reshape(-1, 4)

    def column(self, name: str) -> np.ndarray:
        """image, category or group, (N,), the columns' own memory."""
        return np.frombuffer(getattr(self, name), dtype=np.int8 if name == "group" else np.int64)


@dataclass(frozen=True)
class Boxes:
    """Boxes by image. classes: (N,) int32. edges: (N, 4) float64, fractions of the image, 0 to 1. order: (M,) int64,
    rows that are kept, by image and then as they were read. starts: (images + 1,) int64, places in `order`."""

    classes: np.ndarray
    edges: np.ndarray
    order: np.ndarray
    starts: np.ndarray

    def of(self, image: int) -> list[list[float]]:
        """[class, x0, y0, x1, y1] of each box of an image, as the json of a sample holds them."""
        rows = self.order[self.starts[image] : self.starts[image + 1]]
        return [[number, *edges] for number, edges in zip(self.classes[rows].tolist(), self.edges[rows].tolist())]

    def counts(self) -> np.ndarray:
        """(images,) int64: boxes of each."""
        return np.diff(self.starts)


def by_image(images: np.ndarray, classes: np.ndarray, edges_N4: np.ndarray, count: int) -> Boxes:
    """Boxes sorted by image. images: (N,) int64, 0 to count - 1; a negative number leaves the box out."""
    kept = np.flatnonzero(images >= 0)
    order = kept[np.argsort(images[kept], kind="stable")]
    starts = np.searchsorted(images[order], np.arange(count + 1))
    return Boxes(classes.astype(np.int32), edges_N4, order, starts)


def to_fractions(edges_N4: np.ndarray, images: np.ndarray, sizes: np.ndarray) -> None:
    """x, y, width, height in pixels -> x0, y0, x1, y1 as fractions, in place. images: (N,) int64, rows of `sizes`
    (width, height) in pixels; boxes with a negative number are left as they are."""
    for start in range(0, len(edges_N4), BLOCK):
        rows = np.flatnonzero(images[start : start + BLOCK] >= 0) + start
        size, edges = sizes[images[rows]], edges_N4[rows]
        with np.errstate(over="ignore", invalid="ignore"):
            edges[:, 2:] += edges[:, :2]
            edges_N4[rows] = edges / np.concatenate([size, size], axis=1)


def settle(edges_N4: np.ndarray, images: np.ndarray, slack: np.ndarray | float) -> np.ndarray:
    """What is wrong with each box, (N,) uint8 of FINE, UNREADABLE, EMPTY, OUTSIDE; boxes that are fine are clipped to
    the image, in place.

    edges_N4: x0, y0, x1, y1 as fractions. images: (N,) int64; boxes with a negative number are not looked at. slack:
    how far outside an edge may lie, as fractions (width, height) of each image, or one number for all.
    """
    found = np.zeros(len(edges_N4), dtype=np.uint8)
    for start in range(0, len(edges_N4), BLOCK):
        part = slice(start, min(start + BLOCK, len(edges_N4)))
        edges, mine = edges_N4[part], images[part]
        some = slack[np.maximum(mine, 0)] if isinstance(slack, np.ndarray) else slack
        low, high = edges[:, :2], edges[:, 2:]
        codes = np.zeros(len(edges), dtype=np.uint8)
        codes[((low < 0 - some) | (high > 1 + some)).any(axis=1)] = OUTSIDE
        clipped = edges.clip(0, 1)
        inside = (clipped[:, 2:] > clipped[:, :2]).all(axis=1)
        codes[~inside & (codes == FINE)] = EMPTY
        codes[~(high > low).all(axis=1)] = EMPTY
        codes[~np.isfinite(edges).all(axis=1)] = UNREADABLE
        codes[mine < 0] = FINE
        fine = (codes == FINE) & (mine >= 0)
        edges[fine] = clipped[fine]
        found[part] = codes
    return found


def four_numbers(value: Any) -> bool:
    """Whether a value is a list of four numbers that float64 holds."""
    return (
        isinstance(value, list)
        and len(value) == 4
        and all(type(number) in (int, float) and -LARGEST <= number <= LARGEST for number in value)
    )
