"""The boxes of all images, as columns: 49 bytes a box while they are read, about 130 in all while they are sorted by
image."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

BLOCK = 1 << 18
"""Boxes that are worked on at a time."""
LARGEST = sys.float_info.max
FINE, UNREADABLE, EMPTY, OUTSIDE = range(4)
"""What a box is: fine, or with a number that is not finite; without width or height; with an edge outside of the image
by more than rounding explains."""


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
    """Boxes by image. classes: (N,) int16. edges: (N, 4) float64, fractions of the image, 0 to 1. order: (M,) int64,
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


def blocks(count: int) -> Iterator[slice]:
    """Slices of BLOCK boxes each, so that what is worked out between takes little memory."""
    for start in range(0, count, BLOCK):
        yield slice(start, min(start + BLOCK, count))


def by_image(images: np.ndarray, classes: np.ndarray, edges_N4: np.ndarray, count: int) -> Boxes:
    """Boxes sorted by image. images: (N,) int64, 0 to count - 1; a negative number leaves the box out."""
    kept = np.flatnonzero(images >= 0)
    own = images[kept]
    starts = np.concatenate([np.zeros(1, dtype=np.int64), np.bincount(own, minlength=count).cumsum()])
    return Boxes(classes, edges_N4, kept[np.argsort(own, kind="stable")], starts)


def to_fractions(edges_N4: np.ndarray, images: np.ndarray, sizes: np.ndarray) -> None:
    """x, y, width, height in pixels -> x0, y0, x1, y1 as fractions, in place. images: (N,) int64, rows of `sizes`
    (width, height) in pixels; boxes with a negative number are left as they are."""
    for part in blocks(len(edges_N4)):
        rows = np.flatnonzero(images[part] >= 0) + part.start
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
    some = slack[np.maximum(images, 0)] if isinstance(slack, np.ndarray) else slack
    low, high = edges_N4[:, :2], edges_N4[:, 2:]
    clipped = edges_N4.clip(0, 1)
    codes = np.zeros(len(edges_N4), dtype=np.uint8)
    codes[~(clipped[:, 2:] > clipped[:, :2]).all(axis=1)] = EMPTY
    codes[((low < 0 - some) | (high > 1 + some)).any(axis=1)] = OUTSIDE
    codes[~(high > low).all(axis=1)] = EMPTY
    codes[~np.isfinite(edges_N4).all(axis=1)] = UNREADABLE
    codes[images < 0] = FINE
    fine = (codes == FINE) & (images >= 0)
    edges_N4[fine] = clipped[fine]
    return codes


def four_numbers(value: Any) -> bool:
    """Whether a value is a list of four numbers that float64 holds."""
    return (
        isinstance(value, list)
        and len(value) == 4
        and all(type(number) in (int, float) and -LARGEST <= number <= LARGEST for number in value)
    )
