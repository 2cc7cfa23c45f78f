"""What a caption of the captioned-shapes world claims, read from its text.

The words are listed here independently of preprocess/shapes/captions.py: the judge must not share the author's code.
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
    """What a caption claims about one object. size: None when the caption names none."""

    shape: str
    colour: str
    size: str | None


@dataclass(frozen=True)
class Claims:
    """What a caption claims. objects: in order of mention. relation: of the first object to the second."""

    objects: tuple[Claim, ...]
    place: str | None = None
    relation: str | None = None


def parse(caption: str) -> Claims | None:
    """The claims of a caption of the shapes world; None for any other text."""
    text = " ".join(caption.lower().replace(",", " , ").split()).strip(" .")
    matches = list(OBJECT.finditer(text))
    if not matches or not OPENING.fullmatch(text[: matches[0].start()].strip()):
        return None
    objects = tuple(
        Claim(SHAPE_OF_WORD[m["shape"]], m["colour"], SIZE_OF_WORD[m["size"]] if m["size"] else None) for m in matches
    )
    links = [text[a.end() : b.start()].strip().replace(" ,", ",") for a, b in pairwise(matches)]
    relation = None
    if links and not LINK.fullmatch(links[0]):
        relation = _matching(RELATION, links[0])
        if relation is None:
            return None
        links = links[1:]
    if not all(LINK.fullmatch(link) for link in links):
        return None
    ending = text[matches[-1].end() :].strip()
    place = _matching(PLACE, ending)
    if ending and (place is None or len(objects) > 1):
        return None
    return Claims(objects, place, relation)


def _matching(patterns: dict[str, re.Pattern[str]], text: str) -> str | None:
    return next((name for name, pattern in patterns.items() if pattern.fullmatch(text)), None)
