"""Draws what was given: label maps in colours, and boxes."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageColor, ImageDraw

PAPER = (236, 236, 232)
"""Colour of label 0, and of what is outside all boxes."""
TURN = 0.618034
"""Golden ratio: successive multiples of this part of the colour circle never come near each other."""
THICKNESS = 64
"""Pixels of a picture's side for each pixel of a box's outline."""


def colour_of(number: int, name: str = "") -> tuple[int, ...]:
    """A colour for label `number`, or for class `number` - 1: that of its name ("red square"), or else one of its own.
    PAPER for 0."""
    if named := next((word for word in name.lower().split() if word in ImageColor.colormap), ""):
        return ImageColor.getrgb(named)
    if number <= 0:
        return PAPER
    red, green, blue = colorsys.hsv_to_rgb(number * TURN % 1, 0.75, 0.62 + 0.3 * (number // 5 % 2))
    return round(red * 255), round(green * 255), round(blue * 255)


def coloured(labels: np.ndarray, size: tuple[int, int], names: Sequence[str]) -> np.ndarray:
    """A label map (h, w) uint8 in colours, enlarged to `size` (width, height): (H, W, 3) uint8. names: of the labels,
    where they have any."""
    palette = np.array([colour_of(number, _name(names, number)) for number in range(256)], np.uint8)
    return enlarged(palette[labels], size)


def enlarged(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A picture (h, w, 3) uint8 at another size (width, height), its pixels as they are: (H, W, 3) uint8."""
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.NEAREST))


def outlines(boxes: Sequence[tuple[int, Sequence[float]]], size: tuple[int, int], names: Sequence[str]) -> np.ndarray:
    """Boxes (class, edges x0, y0, x1, y1 as fractions) on an empty picture of `size` (width, height), the largest
    first: (H, W, 3) uint8. names: of the classes, where they have any."""
    width, height = size
    picture = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(picture)
    for number, (x0, y0, x1, y1) in sorted(boxes, key=lambda box: -(box[1][2] - box[1][0]) * (box[1][3] - box[1][1])):
        left, top = round(x0 * width), round(y0 * height)
        right, bottom = max(round(x1 * width) - 1, left), max(round(y1 * height) - 1, top)
        colour, width_of_line = colour_of(number + 1, _name(names, number)), max(1, min(size) // THICKNESS)
        draw.rectangle((left, top, right, bottom), outline=colour, width=width_of_line)
    return np.asarray(picture)


def _name(names: Sequence[str], number: int) -> str:
    return names[number] if number < len(names) else ""
