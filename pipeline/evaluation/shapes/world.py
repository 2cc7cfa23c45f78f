"""The shapes world's labels: which number stands for which shape of which colour, and which caches have them.

Label 1 + 6 x shape + colour, from 1 to 24, is that of an object in label maps and box lists; 0 is the background. Class
k of a whole picture is label k + 1. The words are listed independently of preprocess/shapes, as in claims.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from pipeline.conditions.facts import Conditions
from pipeline.evaluation.shapes.claims import COLOUR_NAMES
from pipeline.evaluation.shapes.oracle import FIT, UNKNOWN, SeenObject, see_pixels

CANVAS = 64
"""Side in pixels of the pictures that the oracle judges."""
SHAPE_NAMES = tuple(FIT)
OBJECTS = len(SHAPE_NAMES) * len(COLOUR_NAMES)
"""Number of labels without the background's."""
LABELS = 1 + OBJECTS
UNKNOWN_LABEL = 255
"""Of what is no object of the world."""


def label_of(thing: SeenObject) -> int:
    """The label of an object in a picture; UNKNOWN_LABEL for one of unknown shape, colour or size."""
    if UNKNOWN in (thing.shape, thing.colour, thing.size):
        return UNKNOWN_LABEL
    return 1 + SHAPE_NAMES.index(thing.shape) * len(COLOUR_NAMES) + COLOUR_NAMES.index(thing.colour)


def are_objects(names: Sequence[str]) -> bool:
    """Whether these are the names of the 24 objects in the order of their labels: "red circle", "green circle", ... (a
    name's words may stand in any order)."""
    wanted = [{colour, shape} for shape in SHAPE_NAMES for colour in COLOUR_NAMES]
    return [set(re.findall("[a-z]+", name.lower())) for name in names] == wanted


def are_labels(names: Sequence[str], count: int) -> bool:
    """Whether these are the 25 labels of the world: the names of the objects after one for the background, or 25
    without names."""
    return count == LABELS and (not names or (len(names) == LABELS and are_objects(names[1:])))


def has_names(conditions: Conditions) -> bool:
    """Whether a cache's classes, boxes or labels are those of the world."""
    classes, boxes, labels = conditions.classes, conditions.boxes, conditions.labels
    return (
        (classes is not None and are_objects(classes.names))
        or (boxes is not None and (are_labels(boxes.names, boxes.count) or are_objects(boxes.names)))
        or (labels is not None and are_labels(labels.names, labels.count))
    )


def is_canvas(pictures: np.ndarray) -> bool:
    """Whether pictures (B, H, W, 3) have the size that the oracle judges."""
    return pictures.shape[1:3] == (CANVAS, CANVAS)


def sight(picture: np.ndarray) -> tuple[tuple[int, SeenObject, np.ndarray], ...]:
    """What a picture (H, W, 3) uint8 shows, from the largest to the smallest object: label, object, and its pixels
    (H, W) bool. A picture that is judged several times in a row is looked at once."""
    return _sight(np.ascontiguousarray(picture).tobytes(), picture.shape)


@lru_cache(maxsize=512)
def _sight(data: bytes, shape: tuple[int, ...]) -> tuple[tuple[int, SeenObject, np.ndarray], ...]:
    seen = see_pixels(np.frombuffer(data, np.uint8).reshape(shape))
    return tuple((label_of(thing), thing, pixels) for thing, pixels in seen)


def segment(picture: np.ndarray) -> np.ndarray:
    """The label of each pixel of a picture (H, W, 3) uint8: (H, W) uint8, UNKNOWN_LABEL where an object is none of the
    world's."""
    labels = np.zeros(picture.shape[:2], np.uint8)
    for label, _, pixels in sight(picture):
        labels[pixels] = label
    return labels
