"""Irregular holes as those of LaMa (Suvorov et al. 2022, "Resolution-robust Large Mask Inpainting"): strokes of a brush
along broken lines, or boxes.

The sizes are those of its configurations random_{thin,medium,thick}_{256,512}, at the size of the crop. All arithmetic
is in whole numbers, so that every machine paints the same pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.conditions.draws import Draws

TRIES = 20
"""Holes drawn until one hides half of the crop or less; of holes that all hide more, the smallest is taken."""
SHORTEST, NARROWEST = 10, 5
"""Of a line and of a brush, in pixels of a recipe."""
LINES = 5
"""Most lines of a stroke."""
DIRECTIONS = ((655, 65533), (55498, 34856), (59316, -27867), (8599, -64969))
"""(sin, cos) * 2**16 of the four angles of a line, .01 + 0, 1, 2 or 3; every other stroke is mirrored, sin to -sin."""
STROKES, BOXES = 10, 3
"""Chances of a hole of strokes and of a hole of boxes, where a recipe has both."""
FAR = 1 << 40
ONE = np.int32(1)
"""Of the type of what it is added to, which spares NumPy a slow conversion."""


@dataclass(frozen=True)
class _Recipe:
    """Ranges from which a hole is drawn, ends included; lengths are in pixels of a crop whose shorter side is `side`.

    LaMa's code draws up to one stroke more than max_times says, and lengths from 10 and widths from 5 to below 10 and 5
    more than max_len and max_width.
    """

    side: int
    strokes: tuple[int, int]
    width: int
    length: int
    boxes: tuple[int, int] = (0, 0)
    sides: tuple[int, int] = (0, 0)
    margin: int = 0

    def scaled(self, pixels: int, side: int) -> int:
        """A length at a crop whose shorter side is `side`, rounded, and 1 at the least."""
        return max((pixels * side + self.side // 2) // self.side, 1)


RECIPES = {
    "thin": (_Recipe(256, (4, 51), 10, 40), _Recipe(512, (4, 71), 20, 100)),
    "medium": (
        _Recipe(256, (4, 6), 50, 100, (1, 5), (10, 50), 0),
        _Recipe(512, (4, 11), 100, 200, (1, 5), (30, 150), 0),
    ),
    "thick": (
        _Recipe(256, (1, 6), 100, 200, (1, 3), (30, 150), 10),
        _Recipe(512, (1, 6), 250, 450, (1, 4), (30, 300), 10),
    ),
}
"""Each kind at 256 and at 512 pixels; the second is used from 512 pixels on."""


def draw_strokes(kind: str, key: str, size: tuple[int, int], variant: int) -> np.ndarray:
    """A hole, (H, W) uint8 of 0 and 1. size: (width, height) of the crop in pixels."""
    draws, side = Draws(kind, key, variant), min(size)
    small, large = RECIPES[kind]
    recipe = large if side >= large.side else small
    smallest = None
    for _ in range(TRIES):
        of_boxes = recipe.boxes[1] > 0 and draws.choice((False, True), (STROKES, BOXES))
        mask = _boxes(draws, recipe, size, side) if of_boxes else _strokes(draws, recipe, size, side)
        hidden = int(mask.sum())
        if smallest is None or hidden < smallest[0]:
            smallest = (hidden, mask)
        if 2 * hidden <= mask.size:
            break
    assert smallest is not None
    return smallest[1]


def _boxes(draws: Draws, recipe: _Recipe, size: tuple[int, int], side: int) -> np.ndarray:
    mask = np.zeros(size[::-1], dtype=np.uint8)
    margin = recipe.scaled(recipe.margin, side) if recipe.margin else 0
    for _ in range(draws.integer(*recipe.boxes)):
        lengths = [recipe.scaled(draws.integer(*recipe.sides), side) for _ in size]
        lengths = [max(min(length, whole - 2 * margin), 1) for length, whole in zip(lengths, size)]
        left, top = (
            draws.integer(low := min(margin, whole - length), max(whole - margin - length, low))
            for length, whole in zip(lengths, size)
        )
        mask[top : top + lengths[1], left : left + lengths[0]] = 1
    return mask


def _strokes(draws: Draws, recipe: _Recipe, size: tuple[int, int], side: int) -> np.ndarray:
    lines = []
    for stroke in range(draws.integer(*recipe.strokes)):
        x, y = (draws.integer(0, whole - 1) for whole in size)
        for _ in range(draws.integer(1, LINES)):
            across, down = DIRECTIONS[draws.integer(0, len(DIRECTIONS) - 1)]
            length = SHORTEST + draws.integer(0, recipe.length - 1)
            width = recipe.scaled(NARROWEST + draws.integer(0, recipe.width - 1), side)
            reach = recipe.side << 16
            to_x = x + length * side * (-across if stroke % 2 == 0 else across) // reach
            to_y = y + length * side * down // reach
            to_x, to_y = min(max(to_x, 0), size[0] - 1), min(max(to_y, 0), size[1] - 1)
            lines.append((x, y, to_x, to_y, width))
            x, y = to_x, to_y
    return paint(np.array(lines, dtype=np.int64), size)


def paint(lines_N5: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Thick lines with round ends, (H, W) uint8: 1 where a pixel is within half a width of a line.

    lines_N5: int64 x0, y0, x1, y1, width in pixels; the ends lie in the crop. size: (width, height), each below 2**14.
    """
    radius = lines_N5[:, 4] // 2
    top = np.maximum(np.minimum(lines_N5[:, 1], lines_N5[:, 3]) - radius, 0)
    rows = np.minimum(np.maximum(lines_N5[:, 1], lines_N5[:, 3]) + radius, size[1] - 1) - top + 1
    line = np.repeat(np.arange(len(lines_N5)), rows)  # each row of each line is one entry from here on
    y = np.arange(len(line)) - (np.cumsum(rows) - rows - top)[line]
    x0, y0, x1, y1, width = lines_N5[line].T
    left, right = _band(x1 - x0, y1 - y0, y - y0, width)
    left, right = left + x0, right + x0
    for centre_x, centre_y in ((x0, y0), (x1, y1)):
        square = (width**2 - 4 * (y - centre_y) ** 2) // 4
        half = np.where(square >= 0, _root(np.maximum(square, 0)), -FAR)
        left, right = np.minimum(left, centre_x - half), np.maximum(right, centre_x + half)
    left, right = np.maximum(left, 0), np.minimum(right, size[0] - 1)
    some = left <= right
    stride = size[0] + 1
    steps = np.zeros(size[1] * stride, dtype=np.int32)  # of the number of lines that cover a pixel, along each row
    np.add.at(steps, y[some] * stride + left[some], ONE)
    np.subtract.at(steps, y[some] * stride + right[some] + 1, ONE)
    cover = np.cumsum(steps.reshape(size[1], stride), axis=1, dtype=np.int32)
    return (cover[:, :-1] > 0).view(np.uint8)


def _band(dx: np.ndarray, dy: np.ndarray, y: np.ndarray, width: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and last x of the pixels of a row y beside a line from (0, 0) to (dx, dy), between its two ends and within
    half a width of it; first > last where there are none."""
    square = dx**2 + dy**2
    reach = _root(width**2 * square // 4)
    low, high = _between(dy, dx * y - reach, dx * y + reach)
    after, before = _between(dx, -dy * y, square - dy * y)
    left, right = np.maximum(low, after), np.minimum(high, before)
    none = (left > right) | (square == 0)
    return np.where(none, FAR, left), np.where(none, -FAR, right)


def _between(factor: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The smallest and largest whole x of low <= factor * x <= high; smallest > largest where there is none."""
    low, high = np.where(factor < 0, -high, low), np.where(factor < 0, -low, high)
    divisor = np.maximum(np.abs(factor), 1)
    every = (factor == 0) & (low <= 0) & (high >= 0)
    never = (factor == 0) & ~every
    smallest, largest = -(-low // divisor), high // divisor
    return (
        np.where(every, -FAR, np.where(never, FAR, smallest)),
        np.where(every, FAR, np.where(never, -FAR, largest)),
    )


def _root(square: np.ndarray) -> np.ndarray:
    """The whole part of square roots of whole numbers below 2**62, exactly."""
    root = np.sqrt(square.astype(np.float64)).astype(np.int64)
    root -= root * root > square  # float64 rounds up at most
    return root
