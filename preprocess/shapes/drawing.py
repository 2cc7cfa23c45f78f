"""Draws scenes and renders their pictures."""

from __future__ import annotations

import io
import itertools
from dataclasses import dataclass

import numpy as np
from PIL import Image

from preprocess.shapes.captions import (
    CANVAS,
    COLOURS,
    SHAPES,
    SIZES,
    Facts,
    ShapeObject,
    describe,
    describe_on_side,
    is_held_out,
)

WORLD = "captioned-shapes-1"  # named in synth.json; a change of the distribution needs a new name
PALETTE = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (45, 80, 220),
    "yellow": (235, 205, 40),
    "purple": (150, 50, 190),
    "cyan": (50, 200, 210),
}
COLOUR_JITTER = 10  # levels of 255 per channel, uniform
BACKGROUND = (200, 245)  # grey levels, inclusive
RADII = {"small": (7.0, 8.0), "large": (12.0, 13.0)}  # pixels, half of the extent
MARGIN = 1.0  # pixels between a box and the edge of the canvas
GAP = 3.0  # pixels between two boxes on at least one axis
COUNT_CUMULATIVE = (0.5, 0.85, 1.0)  # probabilities of at most one, two, three objects
TRIPLES = tuple(itertools.product(SIZES, COLOURS, SHAPES))
HELD_OUT = tuple(triple for triple in TRIPLES if is_held_out(*triple))
SHOWN = tuple(triple for triple in TRIPLES if triple not in HELD_OUT)
ALLOWED = {"train": SHOWN, "val": SHOWN, "heldout": TRIPLES, "all": TRIPLES}
SPLITS = {"train": 0, "heldout": 1, "all": 2, "val": 3}  # in the generator's counter: splits of a seed share no scene
LAYOUTS_TRIED = 32  # layouts that are drawn at a time, until one keeps the distances
PIXEL_CENTRES = np.arange(CANVAS, dtype=np.float32) + 0.5


@dataclass(frozen=True)
class Scene:
    """The content of one picture."""

    objects: tuple[ShapeObject, ...]
    background: int  # grey level
    caption: str
    facts: Facts  # what the caption states

    @property
    def number(self) -> int:
        """The class of its largest object, 0 to 23: one less than the object's label. Of equals the first."""
        return max(self.objects, key=lambda thing: thing.radius).label - 1


def scene(seed: int, index: int, split: str = "train", *, single: bool = False) -> Scene:
    """Scene number `index` of the stream (seed, split). seed and index are in [0, 2**63). single: with one object,
    whatever number is drawn."""
    rng = np.random.Generator(np.random.Philox(counter=[0, 0, 0, SPLITS[split]], key=[seed, index]))
    drawn = 1 + int(np.searchsorted(COUNT_CUMULATIVE, rng.random(), side="right"))
    count = 1 if single else drawn
    triples = _draw_triples(rng, count, split)
    radii = [RADII[size][0] + rng.random() * (RADII[size][1] - RADII[size][0]) for size, _, _ in triples]
    centres = _draw_centres(rng, np.array(radii))
    objects: list[ShapeObject] = []
    for (size, colour, shape), radius, (x, y) in zip(triples, radii, centres, strict=True):
        red, green, blue = (base + _integer(rng, -COLOUR_JITTER, COLOUR_JITTER) for base in PALETTE[colour])
        objects.append(ShapeObject(shape, colour, size, (red, green, blue), (float(x), float(y)), float(radius)))
    background = _integer(rng, *BACKGROUND)
    if split in ("train", "val"):
        caption, facts = describe_on_side(objects, rng, reserved=split == "val")
    else:
        held_out = [i for i, triple in enumerate(triples) if triple in HELD_OUT] if split == "heldout" else []
        caption, facts = describe(objects, rng, always_size=frozenset(held_out))
    return Scene(tuple(objects), background, caption, facts)


def _integer(rng: np.random.Generator, low: int, high: int) -> int:
    """A uniform integer in [low, high], drawn with random(), whose stream numpy keeps between versions, unlike
    integers()."""
    return low + int(rng.random() * (high - low + 1))


def _draw_triples(rng: np.random.Generator, count: int, split: str) -> list[tuple[str, str, str]]:
    """Draws `count` (size, colour, shape) triples of the split, no two with the same colour and shape."""
    triples: list[tuple[str, str, str]] = []
    if split == "heldout":
        triples.append(HELD_OUT[_integer(rng, 0, len(HELD_OUT) - 1)])
    while len(triples) < count:
        triple = ALLOWED[split][_integer(rng, 0, len(ALLOWED[split]) - 1)]
        if all(triple[1:] != other[1:] for other in triples):
            triples.append(triple)
    return triples


def _draw_centres(rng: np.random.Generator, radii: np.ndarray) -> np.ndarray:
    """Draws centres (N, 2) of boxes with half-widths `radii` (N,), uniformly over the layouts that keep MARGIN and
    GAP."""
    low = radii + MARGIN
    while True:
        layouts = low[:, None] + rng.random((LAYOUTS_TRIED, len(radii), 2)) * (CANVAS - 2 * low)[:, None]
        fits = np.ones(LAYOUTS_TRIED, dtype=bool)
        for i, j in itertools.combinations(range(len(radii)), 2):
            apart = np.abs(layouts[:, i] - layouts[:, j]).max(axis=-1)
            fits &= apart >= radii[i] + radii[j] + GAP
        if fits.any():
            return layouts[int(fits.argmax())]


def _coverage(thing: ShapeObject) -> np.ndarray:
    """How much of each pixel an object covers, estimated from the distance of the pixel's centre to the edge: (64, 64)
    float32 in [0, 1]."""
    dx = PIXEL_CENTRES[None, :] - np.float32(thing.centre[0])
    dy = PIXEL_CENTRES[:, None] - np.float32(thing.centre[1])
    r = np.float32(thing.radius)
    if thing.shape == "circle":
        inside = r - np.sqrt(dx * dx + dy * dy)
    elif thing.shape == "square":
        return np.clip(r - np.abs(dx) + 0.5, 0, 1) * np.clip(r - np.abs(dy) + 0.5, 0, 1)
    elif thing.shape == "triangle":  # apex (0, -r), base from (-r, r) to (r, r); its sides lean 1 in 2
        sides = (r + dy - 2 * np.abs(dx)) / np.float32(5**0.5)
        inside = np.minimum(sides, r - dy)
    else:
        across = np.clip(r - np.abs(dx) + 0.5, 0, 1) * np.clip(r / 3 - np.abs(dy) + 0.5, 0, 1)
        upright = np.clip(r / 3 - np.abs(dx) + 0.5, 0, 1) * np.clip(r - np.abs(dy) + 0.5, 0, 1)
        return np.maximum(across, upright)
    return np.clip(inside + 0.5, 0, 1)


def render(scene: Scene) -> np.ndarray:
    """The picture of a scene, (64, 64, 3) uint8 RGB."""
    canvas = np.full((CANVAS, CANVAS, 3), scene.background, dtype=np.float32)
    for thing in scene.objects:
        cover = _coverage(thing)[..., None]
        canvas += cover * (np.array(thing.rgb, dtype=np.float32) - canvas)
    return (canvas + 0.5).astype(np.uint8)


def label_map(scene: Scene) -> np.ndarray:
    """The label map of a scene, (64, 64) uint8: the `ShapeObject.label` that covers at least half of the pixel, or
    0."""
    labels = np.zeros((CANVAS, CANVAS), dtype=np.uint8)
    for thing in scene.objects:
        labels[_coverage(thing) >= 0.5] = thing.label
    return labels


def _png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format="PNG", compress_level=6)
    return out.getvalue()
