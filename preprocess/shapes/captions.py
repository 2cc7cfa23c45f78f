"""The objects of a scene of the captioned-shapes world, and the wording of its caption.

A caption names the colour and shape of every object, sometimes the size, and sometimes places or relations. It states a
place or a relation only when it is plain to see (`CLEAR_EDGE`, `CLEAR_OFFSET`), so that the pixel oracle can check a
picture against it. The probabilities are part of the world's definition: a change of one makes another dataset.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
SIZES = ("small", "large")

CANVAS = 64  # side of a picture in pixels
CLEAR_EDGE = 22.0  # a centre this near to a side (pixels) is plainly "on the left", "at the top", ...
CLEAR_MIDDLE = 6.0  # a centre within this of the canvas's centre on both axes is plainly "in the middle"
CLEAR_OFFSET = 14.0  # two centres this far apart on the dominant axis are plainly "left of", "above", ...

SIZE_NAMED = 0.7  # probability that a caption names an object's size
PLACE_NAMED = 0.5  # ... a lone object's place, where one is plain
RELATION_NAMED = 0.6  # ... the relation of the first two objects, where one is plain

RESERVED = 4  # one caption in this many is reserved for split "val"
WORDINGS_TRIED = 16  # of the same facts, until one belongs to the split; after that the facts are drawn again

PREFIXES = ("", "a picture of ", "an image of ", "a drawing of ", "there is ", "one sees ")
SHAPE_WORDS = {
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "cross": ("cross",),
}
SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
PLACE_WORDS = {
    "left": ("on the left", "at the left", "on the left side"),
    "right": ("on the right", "at the right", "on the right side"),
    "top": ("at the top", "near the top"),
    "bottom": ("at the bottom", "near the bottom"),
    "middle": ("in the middle", "in the centre"),
}
RELATION_WORDS = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}


@dataclass(frozen=True)
class ShapeObject:
    """One object of a scene. Lengths are in pixels, y points down, and pixel (i, j) covers [j, j+1) x [i, i+1)."""

    shape: str  # one of SHAPES
    colour: str  # one of COLOURS
    size: str  # one of SIZES
    rgb: tuple[int, int, int]  # the colour as painted, jittered
    centre: tuple[float, float]  # (x, y)
    radius: float  # half of the extent

    @property
    def box(self) -> tuple[float, float, float, float]:
        """The bounding box (x0, y0, x1, y1), which every shape touches on all sides."""
        (x, y), r = self.centre, self.radius
        return x - r, y - r, x + r, y + r

    @property
    def label(self) -> int:
        """The object's class in label maps and box lists: 1 + shape * 6 + colour, in 1..24."""
        return 1 + SHAPES.index(self.shape) * len(COLOURS) + COLOURS.index(self.colour)


CLASS_NAMES = tuple(f"{colour} {shape}" for shape in SHAPES for colour in COLOURS)
"""Names of the classes 0 to 23; the label of an object is one more."""


@dataclass(frozen=True)
class StatedObject:
    """What a caption says of one object. size: None when the caption does not name it."""

    shape: str
    colour: str
    size: str | None


@dataclass(frozen=True)
class Facts:
    """What a caption states, in the order of mention."""

    objects: tuple[StatedObject, ...]
    place: str | None = None  # of a lone object: a key of PLACE_WORDS
    relation: str | None = None  # of the first object to the second: a key of RELATION_WORDS


def is_held_out(size: str, colour: str, shape: str) -> bool:
    """Whether a triple is kept out of the splits "train" and "val", as 12 of the 48 are.

    Held out are small objects with shape = colour (mod 4) and large ones with shape = colour + 2 (mod 4), counted as in
    SHAPES and COLOURS. So every colour loses 2 triples, every shape 3, every size 6, and no pair of colour and shape
    loses both sizes.
    """
    return SHAPES.index(shape) == (COLOURS.index(colour) + 2 * SIZES.index(size)) % len(SHAPES)


def is_reserved(caption: str) -> bool:
    """Whether this caption is reserved for split "val"; split "train" chooses another wording."""
    return hashlib.sha256(caption.encode()).digest()[0] % RESERVED == 0


def plain_places(x: float, y: float) -> list[str]:
    """The places (keys of PLACE_WORDS) that a single object with this centre plainly has: none, one or two."""
    far = CANVAS - CLEAR_EDGE
    places = [name for name, holds in (("left", x <= CLEAR_EDGE), ("right", x >= far)) if holds]
    places += [name for name, holds in (("top", y <= CLEAR_EDGE), ("bottom", y >= far)) if holds]
    if abs(x - CANVAS / 2) <= CLEAR_MIDDLE and abs(y - CANVAS / 2) <= CLEAR_MIDDLE:
        places.append("middle")
    return places


def plain_relation(a: ShapeObject, b: ShapeObject) -> str | None:
    """The relation of `a` to `b` (a key of RELATION_WORDS) when it is plain, else None."""
    dx, dy = a.centre[0] - b.centre[0], a.centre[1] - b.centre[1]
    if max(abs(dx), abs(dy)) < CLEAR_OFFSET:
        return None
    if abs(dx) >= abs(dy):
        return "left" if dx < 0 else "right"
    return "above" if dy < 0 else "below"


def _pick(rng: np.random.Generator, words: tuple[str, ...]) -> str:
    return words[int(rng.random() * len(words))]


def describe(
    objects: Sequence[ShapeObject], rng: np.random.Generator, always_size: frozenset[int] = frozenset()
) -> tuple[str, Facts]:
    """Draws a caption for `objects`. Returns the caption and the facts that it states.

    The order of mention is drawn from `rng`. The sizes of the objects whose indices are in `always_size` are named.
    """
    order = [int(i) for i in np.argsort(rng.random(len(objects)))]
    mentioned = [objects[i] for i in order]
    named = [bool(rng.random() < SIZE_NAMED) or i in always_size for i in order]
    stated = tuple(
        StatedObject(thing.shape, thing.colour, thing.size if names_size else None)
        for thing, names_size in zip(mentioned, named, strict=True)
    )
    place = relation = None
    if len(mentioned) == 1:
        places = plain_places(*mentioned[0].centre)
        if places and rng.random() < PLACE_NAMED:
            place = _pick(rng, tuple(places))
    else:
        plain = plain_relation(mentioned[0], mentioned[1])
        if plain and rng.random() < RELATION_NAMED:
            relation = plain
    facts = Facts(stated, place, relation)
    return wording(facts, rng), facts


def describe_on_side(objects: Sequence[ShapeObject], rng: np.random.Generator, reserved: bool) -> tuple[str, Facts]:
    """Like `describe`, with a caption for which `is_reserved` gives `reserved`."""
    while True:
        caption, facts = describe(objects, rng)
        for _ in range(WORDINGS_TRIED):
            if is_reserved(caption) == reserved:
                return caption, facts
            caption = wording(facts, rng)


def wording(facts: Facts, rng: np.random.Generator) -> str:
    """Draws one of the captions that state `facts`."""
    phrases = []
    for thing in facts.objects:
        size_word = _pick(rng, SIZE_WORDS[thing.size]) + " " if thing.size else ""
        phrases.append(f"a {size_word}{thing.colour} {_pick(rng, SHAPE_WORDS[thing.shape])}")
    if len(phrases) == 1:
        text = phrases[0] + (" " + _pick(rng, PLACE_WORDS[facts.place]) if facts.place else "")
    elif facts.relation:
        text = f"{phrases[0]} {_pick(rng, RELATION_WORDS[facts.relation])} {phrases[1]}"
        text += "".join(f", and {phrase}" for phrase in phrases[2:])
    else:
        text = ", ".join(phrases[:-1]) + " and " + phrases[-1]
    return _pick(rng, PREFIXES) + text


def holds(facts: Facts, objects: Sequence[ShapeObject]) -> bool:
    """Whether a picture of exactly `objects` plainly shows what a caption states, with nothing wrong, missing or
    extra."""
    objects_by_look = {(thing.shape, thing.colour): thing for thing in objects}
    if len(facts.objects) != len(objects) or any(
        (stated.shape, stated.colour) not in objects_by_look for stated in facts.objects
    ):
        return False
    mentioned = [objects_by_look[stated.shape, stated.colour] for stated in facts.objects]
    if len({id(thing) for thing in mentioned}) != len(objects):
        return False
    return (
        all(stated.size in (None, thing.size) for stated, thing in zip(facts.objects, mentioned, strict=True))
        and (facts.place is None or facts.place in plain_places(*mentioned[0].centre))
        and (facts.relation is None or facts.relation == plain_relation(mentioned[0], mentioned[1]))
    )
