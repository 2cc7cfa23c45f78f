"""Pictures of what a model was given: boxes as outlines, label maps in colours, small images enlarged."""

from __future__ import annotations

import colorsys

import numpy as np
from PIL import Image, ImageDraw

PAPER = (250, 250, 248)
GREY = (70, 70, 70)
"""Colour of label 0, which most sets of labels give to what has no other."""


def colour(number: int) -> tuple[int, int, int]:
    """The colour of a class or label: its hue is golden ratios apart from its neighbours'."""
    red, green, blue = colorsys.hsv_to_rgb(number * 0.618034 % 1, 0.55 + 0.2 * (number % 3), 0.95 - 0.15 * (number % 4))
    return round(255 * red), round(255 * green), round(255 * blue)


COLOURS = np.array([GREY, *(colour(number) for number in range(1, 256))], np.uint8)
"""(256, 3): of labels."""


def blank(size: tuple[int, int], of: tuple[int, int, int]) -> np.ndarray:
    """A picture of one colour, (H, W, 3) uint8. size: (width, height)."""
    return np.full((size[1], size[0], 3), of, np.uint8)


def coloured(labels_HW: np.ndarray) -> np.ndarray:
    """A label map, (H, W) uint8, in colours: (H, W, 3) uint8."""
    return COLOURS[labels_HW]


def enlarged(picture_HWC: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The picture at `size` (width, height): each pixel is that of the picture which lies at its middle."""
    return np.asarray(Image.fromarray(picture_HWC).resize(size, Image.Resampling.NEAREST))


def outlined(pictures: np.ndarray, boxes_N5: np.ndarray) -> np.ndarray:
    """A copy of pictures (n, H, W, 3) uint8 with the outline, one pixel wide, of each box: class, x0, y0, x1, y1 as
    fractions of the picture. Rows of -1 are no boxes."""
    height, width = pictures.shape[1:3]
    sheets = [Image.fromarray(picture) for picture in pictures]
    for number, *edges in boxes_N5.astype(np.float64).tolist():
        if number < 0:
            continue
        x0, y0, x1, y1 = (round(edge * side) for edge, side in zip(edges, (width, height) * 2, strict=True))
        x0, y0 = min(x0, width - 1), min(y0, height - 1)
        for sheet in sheets:
            ImageDraw.Draw(sheet).rectangle((x0, y0, max(x1 - 1, x0), max(y1 - 1, y0)), outline=colour(int(number)))
    return np.stack([np.asarray(sheet) for sheet in sheets])
