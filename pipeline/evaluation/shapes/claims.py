"""What a caption of the captioned-shapes world claims, read from its text alone.

The words are listed here anew, apart from those of preprocess/shapes/captions.py: the judge must not learn from
the author what the author meant.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise

COLOUR_NAMES = ("red", "green", "blue", "yellow", "purple", "cyan")
SIZE_OF_WORD = {"small": "small", "little": "small", "large": "large", "big": "large"}
SHAPE_OF_WORD = {
    "circle": "circle",
    "disc": "circle",
    "square": "square",
    "box": "square",
    "triangle": "triangle",
    "cross": "cross",
}
OBJECT = re.compile(
    rf"\ba (?:(?P<size>{'|'.join(SIZE_OF_WORD)}) )?(?P<colour>{'|'.join(COLOUR_NAMES)})"
    rf" (?P<shape>{'|'.join(SHAPE_OF_WORD)})\b"
)
OPENING = re.compile(r"(?:an? (?:picture|image|drawing|photo) of|there is|one sees)?")
RELATION = {
    "left": re.compile(r"(?:is )?(?:to the )?left of"),
    "right": re.compile(r"(?:is )?(?:to the )?right of"),
    "above": re.compile(r"(?:is )?(?:above|over)"),
    "below": re.compile(r"(?:is )?(?:below|under)"),
}
PLACE = {
    "left": re.compile(r"(?:is )?(?:on|at) the left(?: side)?"),
    "right": re.compile(r"(?:is )?(?:on|at) the right(?: side)?"),
    "top": re.compile(r"(?:is )?(?:at|near) the top"),
    "bottom": re.compile(r"(?:is )?(?:at|near) the bottom"),
    "middle": re.compile(r"(?:is )?in the (?:middle|centre|center)"),
}
LINK = re.compile(r",|and|, and")


@dataclass(frozen=True)
class Claim:
    """What a caption says of one object; `size` is None where it says nothing."""

    shape: str
    colour: str
    size: str | None


@dataclass(frozen=True)
class Claims:
    """What a caption says, objects in its order of mention. `relation` is that of the first to the second."""

    objects: tuple[Claim, ...]
    place: str | None = None
    relation: str | None = None


def parse(caption: str) -> Claims | None:
    """The claims of a caption of the shapes world; None for any other text."""
    text = " ".join(caption.lower().replace(",", " , ").split()).strip(" .")
    found = list(OBJECT.finditer(text))
    if not found or not OPENING.fullmatch(text[: found[0].start()].strip()):
        return None
    objects = tuple(
        Claim(SHAPE_OF_WORD[m["shape"]], m["colour"], SIZE_OF_WORD[m["size"]] if m["size"] else None) for m in found
    )
    links = [text[a.end() : b.start()].strip().replace(" ,", ",") for a, b in pairwise(found)]
    relation = None
    if links and not LINK.fullmatch(links[0]):
        relation = _named(RELATION, links[0])
        if relation is None:
            return None
        links = links[1:]
    if not all(LINK.fullmatch(link) for link in links):
        return None
    ending = text[found[-1].end() :].strip()
    place = _named(PLACE, ending)
    if ending and (place is None or len(objects) > 1):
        return None
    return Claims(objects, place, relation)


def _named(patterns: dict[str, re.Pattern[str]], text: str) -> str | None:
    return next((name for name, pattern in patterns.items() if pattern.fullmatch(text)), None)
