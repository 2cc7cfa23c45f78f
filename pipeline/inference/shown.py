"""Pictures of what a model was given: boxes as outlines, label maps in colours, small images enlarged."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image, ImageColor, ImageDraw

PAPER = (236, 236, 232)
"""Colour of label 0, which most sets of labels give to what has no other, and of what is outside all boxes."""
TURN = 0.618034
"""Golden ratio: successive multiples of this part of the colour circle never come near each other."""
THICKNESS = 128
"""Pixels of a picture's shorter side for each pixel of a box's outline."""


def colour_of(number: int, name: str = "") -> tuple[int, ...]:
    """The colour, red, green and blue, of label `number` or class `number` - 1: that of its name ("red square"), or
    else one of its own. PAPER for 0."""
    if named := next((word for word in name.lower().split() if word in ImageColor.colormap), ""):
        return ImageColor.getrgb(named)
    if number <= 0:
        return PAPER
    red, green, blue = colorsys.hsv_to_rgb(number * TURN % 1, 0.55 + 0.2 * (number % 3), 0.95 - 0.15 * (number % 4))
    return round(255 * red), round(255 * green), round(255 * blue)


@lru_cache(maxsize=4)
def palette(names: tuple[str, ...] = ()) -> np.ndarray:
    """Colours of labels, (256, 3) uint8. names: of the labels, where they have any."""
    return np.array([colour_of(number, _name(names, number)) for number in range(256)], np.uint8)


def coloured(labels: np.ndarray, size: tuple[int, int], names: Sequence[str] = ()) -> np.ndarray:
    """A label map (h, w) uint8 in colours, enlarged to `size` (width, height): (H, W, 3) uint8."""
    return enlarged(palette(tuple(names))[labels], size)


def enlarged(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A picture (h, w, 3) uint8 at `size` (width, height): each pixel is that of the picture which lies at its
    middle."""
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.NEAREST))


def blank(size: tuple[int, int]) -> np.ndarray:
    """An empty picture, (H, W, 3) uint8. size: (width, height)."""
    return np.full((size[1], size[0], 3), PAPER, np.uint8)


def outlined(pictures: np.ndarray, boxes_N5: np.ndarray, names: Sequence[str] = ()) -> np.ndarray:
    """A copy of pictures (n, H, W, 3) uint8 with the outline of each box, the largest first: class, x0, y0, x1, y1 as
    fractions of the picture. Rows of -1 are no boxes. names: of the classes, where they have any."""
    height, width = pictures.shape[1:3]
    sheets = [Image.fromarray(picture) for picture in pictures]
    boxes = [box for box in boxes_N5.astype(np.float64).tolist() if box[0] >= 0]
    for number, *edges in sorted(boxes, key=lambda box: -(box[3] - box[1]) * (box[4] - box[2])):
        x0, y0, x1, y1 = (round(edge * side) for edge, side in zip(edges, (width, height) * 2, strict=True))
        x0, y0 = min(x0, width - 1), min(y0, height - 1)
        colour = colour_of(int(number) + 1, _name(names, int(number)))
        for sheet in sheets:
            ImageDraw.Draw(sheet).rectangle(
                (x0, y0, max(x1 - 1, x0), max(y1 - 1, y0)),
                outline=colour,
                width=max(1, min(width, height) // THICKNESS),
            )
    return np.stack([np.asarray(sheet) for sheet in sheets])


def _name(names: Sequence[str], number: int) -> str:
    return names[number] if number < len(names) else ""
