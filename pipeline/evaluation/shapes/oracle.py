"""The pixel judge of the captioned-shapes world: does a picture show what its caption says?

It shares no code with the renderer or the models and knows only the description of the world: a few shapes of six
saturated colours on a light grey. `parse` reads a caption's claims, `see` finds the objects in the pixels, and `judge`
compares them. A picture is right only when every claim is right and it shows exactly as many objects as the caption
names. Anything that the judge does not know (a shape that fits no template, a colour that is none of the six, two
colours in one object, dark stains) is an object of unknown kind and therefore wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np
from scipy import ndimage

from pipeline.evaluation.shapes.claims import Claims, parse

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (45, 80, 220),
    "yellow": (235, 205, 40),
    "purple": (150, 50, 190),
    "cyan": (50, 200, 210),
}
COLOUR_NAMES = tuple(COLOURS)
COLOUR_VALUES = np.array([COLOURS[name] for name in COLOUR_NAMES], dtype=np.float32)
HUES = COLOUR_VALUES - COLOUR_VALUES.mean(axis=1, keepdims=True)  # mixing with grey shortens but never turns them
HUES /= np.linalg.norm(HUES, axis=1, keepdims=True)
CHROMAS = COLOUR_VALUES.max(axis=1) - COLOUR_VALUES.min(axis=1)
UNKNOWN = "unknown"

COVERED = 0.5  # share of the palette's chroma from which a pixel belongs to an object
COLOUR_RADIUS = 60.0  # Euclidean distance in RGB levels within which an object has a palette's colour
PURITY = 0.85  # share of the coloured pixels in an object's box that must have its hue
SMALLEST = 25  # pixels of area below which a component is no object
STAIN = 45.0  # levels of difference from the background from which a colourless region is an object
# Intersection over union with its own template below which a shape is unknown. The triangle's tips blur first.
FIT = {"circle": 0.75, "square": 0.75, "triangle": 0.7, "cross": 0.75}
TIP = (0.5, 1.0, 1.5)  # pixels of a triangle's tip that may be too faint to see
MARGIN_OF_FIT = 0.02  # by which the best template must exceed the next
ASPECT = 0.75  # shortest side over longest side of any shape's box
SMALL, LARGE = (10.5, 20.5), (20.5, 31.0)  # extent in pixels (mean of width and height)
NEAR_SIDE = 24.0  # pixels from a side within which "on the left" and similar claims hold (the world: 22)
NEAR_MIDDLE = 8.0  # pixels from the middle on both axes (the world: 6)
APART = 12.0  # pixels between centres for "left of" and similar claims (the world: 14)
DIAGONAL = 2.0  # pixels by which the other axis may exceed the named one (the world: 0)
BORDER = 2  # pixels added around the picture and around each component's window
MOST_MATCHED = 6  # objects to which claims are assigned; a picture with more is wrong by count anyway

# ---------------------------------------------------------------------------------------------------------------------
# Pictures


@dataclass(frozen=True)
class SeenObject:
    """One object in a picture. Lengths in pixels, y downwards."""

    shape: str  # or UNKNOWN
    colour: str  # or UNKNOWN
    size: str  # small, large or UNKNOWN
    box: tuple[float, float, float, float]  # x0, y0, x1, y1, to a fraction of a pixel

    @property
    def centre(self) -> tuple[float, float]:
        """(x, y) of the box's middle."""
        x0, y0, x1, y1 = self.box
        return (x0 + x1) / 2, (y0 + y1) / 2


def see(image: np.ndarray) -> list[SeenObject]:
    """The objects in a picture (H, W, 3) uint8, from the largest to the smallest."""
    return [seen_object for seen_object, _ in see_pixels(image)]


def see_pixels(image: np.ndarray) -> list[tuple[SeenObject, np.ndarray]]:
    """As `see`, each object with its pixels (H, W) bool: those that it covers at least by half."""
    assert image.ndim == 3, image.shape
    assert image.dtype == np.uint8, image.dtype
    pixels = np.pad(image.astype(np.float32), ((BORDER, BORDER), (BORDER, BORDER), (0, 0)), mode="edge")
    red, green, blue = np.moveaxis(pixels, 2, 0)
    without_grey = pixels - ((red + green + blue) / 3)[:, :, None]
    hue = (without_grey @ HUES.T).argmax(axis=2)
    # With a grey background, the chroma of an anti-aliased pixel is the object's chroma times the covered share.
    chroma = np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue)
    coverage = chroma / CHROMAS[hue]
    for axis in (0, 1):  # the canvas ends here, and so do objects that touch its edge
        np.moveaxis(coverage, axis, 0)[[*range(BORDER), *range(-BORDER, 0)]] = 0
    covered = coverage >= COVERED
    seen: list[tuple[SeenObject, np.ndarray]] = []
    for colour in np.unique(hue[covered]):
        labels, _ = ndimage.label(covered & (hue == colour))
        for label, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
            # `window` has BORDER pixels on each side of the component's bounding box.
            window = (
                slice(rows.start - BORDER, rows.stop + BORDER),
                slice(columns.start - BORDER, columns.stop + BORDER),
            )
            mask = labels[window] == label
            if int(mask.sum()) >= SMALLEST:
                origin = (columns.start - 2 * BORDER, rows.start - 2 * BORDER)
                thing = _measure_component(pixels[window], coverage[window], covered[window], mask, origin)
                seen.append((thing, (labels == label)[BORDER:-BORDER, BORDER:-BORDER]))
    seen += _stains(image.astype(np.float32), covered[BORDER:-BORDER, BORDER:-BORDER])
    return sorted(seen, key=lambda entry: -int(entry[1].sum()))


def _measure_component(
    pixels: np.ndarray, coverage: np.ndarray, covered: np.ndarray, mask: np.ndarray, origin: tuple[int, int]
) -> SeenObject:
    """Measure the component `mask` (h, w) bool in a window of the picture whose top left pixel is `origin` (x, y)."""
    core = ndimage.binary_erosion(mask)
    core = core if core.any() else mask
    rgb = np.median(pixels[core], axis=0)
    distances = np.linalg.norm(COLOUR_VALUES - rgb, axis=1)
    box = (slice(BORDER, -BORDER), slice(BORDER, -BORDER))
    is_pure = mask.sum() >= PURITY * covered[box].sum()
    colour = COLOUR_NAMES[int(distances.argmin())] if is_pure and distances.min() <= COLOUR_RADIUS else UNKNOWN

    # Coverage to a fraction of a pixel, relative to the object's own chroma, at its pixels and their neighbours.
    reach = ndimage.binary_dilation(mask, structure=np.ones((3, 3), dtype=bool)) & (mask | ~covered)
    own_coverage = np.where(reach, np.minimum(coverage / np.median(coverage[core]), 1), 0)
    x0, x1 = _edges(own_coverage.max(axis=0))
    y0, y1 = _edges(own_coverage.max(axis=1))
    boxes = dict.fromkeys(FIT, (x0, y0, x1, y1))
    fits = {name: _overlap(own_coverage, _template(name, own_coverage.shape, box)) for name, box in boxes.items()}
    for tip in TIP:  # a tip covers little of its pixels, so the box begins slightly above its visible part
        taller = (x0, y0 - tip, x1, y1)
        fit = _overlap(own_coverage, _template("triangle", own_coverage.shape, taller))
        if fit > fits["triangle"]:
            fits["triangle"], boxes["triangle"] = fit, taller
    best, second = sorted(fits, key=lambda name: fits[name], reverse=True)[:2]
    x0, y0, x1, y1 = boxes[best]
    width, height = x1 - x0, y1 - y0
    extent = (width + height) / 2
    size = "small" if SMALL[0] <= extent < SMALL[1] else "large" if LARGE[0] <= extent < LARGE[1] else UNKNOWN
    has_known_size = size != UNKNOWN and min(width, height) >= ASPECT * max(width, height)
    is_clear = fits[best] >= FIT[best] and fits[best] - fits[second] >= MARGIN_OF_FIT
    x, y = origin
    return SeenObject(best if has_known_size and is_clear else UNKNOWN, colour, size, (x + x0, y + y0, x + x1, y + y1))


def _edges(profile: np.ndarray) -> tuple[float, float]:
    """Where a coverage profile begins and ends, in pixels: at its outermost pixels of at least one half, corrected by
    the coverage that these lack and that their outer neighbours have. The profile has BORDER empty pixels on each
    side."""
    inside = np.flatnonzero(profile >= COVERED)
    first, last = int(inside[0]), int(inside[-1])
    start = first + 1 - float(profile[first]) - float(profile[first - 1])
    return start, last + float(profile[last]) + float(profile[last + 1])


def _template(name: str, shape: tuple[int, int], box: tuple[float, float, float, float]) -> np.ndarray:
    """The named shape drawn to fill `box`: (H, W) float32 in [0, 1], from 16 points in each pixel."""
    height, width = shape
    x0, y0, x1, y1 = box
    u = ((np.arange(4 * width) + 0.5) / 4 - x0) / (x1 - x0) * 2 - 1  # -1 at the box's left side, 1 at its right
    v = ((np.arange(4 * height) + 0.5)[:, None] / 4 - y0) / (y1 - y0) * 2 - 1
    if name == "circle":
        inside = u**2 + v**2 <= 1
    elif name == "square":
        inside = (np.abs(u) <= 1) & (np.abs(v) <= 1)
    elif name == "triangle":
        inside = (np.abs(v) <= 1) & (2 * np.abs(u) <= 1 + v)
    else:
        arms = np.minimum(np.abs(u), np.abs(v)) <= 1 / 3
        inside = arms & (np.abs(u) <= 1) & (np.abs(v) <= 1)
    # Four points of a row are four bytes, added as one integer, whose product sums its bytes in the highest one.
    rows = inside.view(np.uint32).reshape(height, 4, width)
    return ((rows[:, 0] + rows[:, 1] + rows[:, 2] + rows[:, 3]) * np.uint32(0x01010101) >> 24).astype(np.float32) / 16


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two coverages in [0, 1]."""
    return float(np.minimum(a, b).sum() / np.maximum(a, b).sum())


def _stains(pixels: np.ndarray, covered: np.ndarray) -> list[tuple[SeenObject, np.ndarray]]:
    """Regions without colour that are far from the background (black, white, washed-out), with their pixels."""
    if covered.all():
        return []
    background = np.median(pixels[~covered], axis=0)
    red, green, blue = np.moveaxis(np.abs(pixels - background), 2, 0)
    far = np.maximum(np.maximum(red, green), blue) > STAIN
    # Edges of objects are two pixels of in-between colours at most.
    labels, _ = ndimage.label(far & ~ndimage.binary_dilation(covered, iterations=2))
    stains = []
    for label, window in enumerate(ndimage.find_objects(labels), start=1):
        if int((labels[window] == label).sum()) >= SMALLEST:
            rows, columns = window
            box = (float(columns.start), float(rows.start), float(columns.stop), float(rows.stop))
            stains.append((SeenObject(UNKNOWN, UNKNOWN, UNKNOWN, box), labels == label))
    return stains


# ---------------------------------------------------------------------------------------------------------------------
# Judgement


@dataclass(frozen=True)
class Verdict:
    """Whether each claim of a caption is right. Tuples have one entry per object in the order of mention."""

    count: bool  # exactly as many objects as the caption names
    shape: tuple[bool, ...]
    colour: tuple[bool, ...]
    size: tuple[bool, ...]  # only of objects whose size is named
    relation: bool | None  # None: nothing claimed
    place: bool | None

    @property
    def correct(self) -> bool:
        """Whether every claim is right, and no object is missing or extra."""
        return all(right for _, right in self.claims())

    def claims(self) -> list[tuple[str, bool]]:
        """Every claim's kind (count, shape, colour, size, relation, place) and whether it is right."""
        several = (("shape", self.shape), ("colour", self.colour), ("size", self.size))
        single = (("relation", self.relation), ("place", self.place))
        return [
            ("count", self.count),
            *((kind, right) for kind, rights in several for right in rights),
            *((kind, right) for kind, right in single if right is not None),
        ]


def judge(image: np.ndarray, caption: str | Claims) -> Verdict:
    """Judge a picture (H, W, 3) uint8 by a caption. Raises ValueError for a caption that `parse` cannot read."""
    claims = parse(caption) if isinstance(caption, str) else caption
    if claims is None:
        raise ValueError(f"not a caption of the shapes world: {caption!r}")
    seen = see(image)
    candidates: list[int | None] = list(range(min(len(seen), MOST_MATCHED)))
    candidates += [None] * max(0, len(claims.objects) - len(candidates))
    verdicts = (_hold(claims, seen, matched, image.shape) for matched in permutations(candidates, len(claims.objects)))
    return max(verdicts, key=lambda verdict: sum(right for _, right in verdict.claims()))


def _hold(
    claims: Claims, seen: Sequence[SeenObject], matched: tuple[int | None, ...], shape: tuple[int, ...]
) -> Verdict:
    """The verdict when claim i is assigned to seen object matched[i] (None: to no object)."""
    assigned = [None if i is None else seen[i] for i in matched]
    pairs = list(zip(claims.objects, assigned, strict=True))
    relation = place = None
    if claims.relation is not None:
        first, second = assigned[:2]
        relation = first is not None and second is not None and _is_related(first, second, claims.relation)
    if claims.place is not None:
        place = assigned[0] is not None and _is_at(assigned[0], claims.place, shape)
    return Verdict(
        count=len(seen) == len(claims.objects),
        shape=tuple(seen_object is not None and seen_object.shape == claim.shape for claim, seen_object in pairs),
        colour=tuple(seen_object is not None and seen_object.colour == claim.colour for claim, seen_object in pairs),
        size=tuple(
            seen_object is not None and seen_object.size == claim.size for claim, seen_object in pairs if claim.size
        ),
        relation=relation,
        place=place,
    )


def _is_related(a: SeenObject, b: SeenObject, relation: str) -> bool:
    """Whether `a` stands in `relation` (left, right, above, below) to `b`."""
    dx, dy = b.centre[0] - a.centre[0], b.centre[1] - a.centre[1]
    along, across = {"left": (dx, dy), "right": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}[relation]
    return along >= APART and along >= abs(across) - DIAGONAL


def _is_at(seen_object: SeenObject, place: str, shape: tuple[int, ...]) -> bool:
    """Whether `seen_object` is at `place` (left, right, top, bottom, middle) of a picture (H, W, ...)."""
    (x, y), (height, width) = seen_object.centre, shape[:2]
    if place == "middle":
        return max(abs(x - width / 2), abs(y - height / 2)) <= NEAR_MIDDLE
    return {"left": x, "right": width - x, "top": y, "bottom": height - y}[place] <= NEAR_SIDE


def attribute_accuracy(images: Iterable[np.ndarray], captions: Iterable[str]) -> dict[str, Any]:
    """The share of pictures that are right in all their claims.

    images: (N, H, W, 3) uint8 or an iterable of (H, W, 3); captions: as many. Returns
    overall: share of pictures with every claim right; n: pictures judged; unread: captions that could not be read,
    whose pictures nobody judges; by_objects: {"1": share, ...} by the number of objects named, n_by_objects: their
    counts; by_attribute: {"colour": share of single claims of that kind that are right, ...}, n_by_attribute: counts.
    `overall` is missing, and the tables are empty, when no caption could be read.
    """
    right_pictures: Counter[str] = Counter()
    pictures: Counter[str] = Counter()
    right_claims: Counter[str] = Counter()
    of_claims: Counter[str] = Counter()
    unread = 0
    for image, caption in zip(images, captions, strict=True):
        claims = parse(caption)
        if claims is None:
            unread += 1
            continue
        verdict = judge(image, claims)
        object_count = str(len(claims.objects))
        pictures[object_count] += 1
        right_pictures[object_count] += verdict.correct
        for kind, holds in verdict.claims():
            of_claims[kind] += 1
            right_claims[kind] += holds
    judged = sum(pictures.values())
    result: dict[str, Any] = {
        "n": judged,
        "unread": unread,
        "by_objects": {
            object_count: right_pictures[object_count] / pictures[object_count] for object_count in sorted(pictures)
        },
        "n_by_objects": {object_count: pictures[object_count] for object_count in sorted(pictures)},
        "by_attribute": {kind: right_claims[kind] / of_claims[kind] for kind in of_claims},
        "n_by_attribute": dict(of_claims),
    }
    if judged:
        result["overall"] = sum(right_pictures.values()) / judged
    return result
