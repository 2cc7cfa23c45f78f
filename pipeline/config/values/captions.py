"""Which of several captions of a record: where they are read, and which one is looked at."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pipeline.config.values.bounds import require

DRAWN = "drawn"
"""The caption that is drawn by weight."""
FIRST = "1"


def require_place(value: str) -> None:
    """Raise ConfigError unless captions can be read there."""
    require(
        value == "txt" or (value.startswith("json:") and len(value) > 5),
        f"caption_key={value}: txt, or json:KEY for a key of the .json member",
    )


def require_places(places: Sequence[str], most: int, weights: Sequence[float]) -> None:
    """Raise ConfigError unless captions can be read at all places, and stored together. most: captions_most.
    weights: caption_weights."""
    for place in places:
        require_place(place)
    shown = f"caption_key=[{','.join(places)}]"
    require(len(set(places)) == len(places), f"{shown}: one of them is given twice")
    require(
        most == 0 or most >= max(2, len(places)),
        f"captions_most={most} with {shown}: {max(2, len(places))} or more is wanted, or 0 for one of each key",
    )
    require(
        most in (0, len(places)) or places != ("txt",),
        f"captions_most={most} with {shown}: a .txt member holds one caption; give caption_key=json:KEY too, whose "
        "value may be a list",
    )
    several = most > 1 or len(places) > 1
    require(several or not weights, f"caption_weights with {shown}: one caption needs no weight, so leave it out")
    shown_weights = f"caption_weights=[{','.join(f'{weight:g}' for weight in weights)}]"
    require(
        len(weights) in (0, len(places)),
        f"{shown_weights} with {shown}: one for each key is wanted (a list of captions shares that of its key)",
    )
    require(not weights or any(weights), f"{shown_weights}: all are 0, so no caption would be drawn")


def is_choice(value: str) -> bool:
    """Whether a text says which caption of a record is taken."""
    return value == DRAWN or re.fullmatch("[1-9][0-9]?", value) is not None


def require_choice(value: str, key: str) -> None:
    """Raise ConfigError unless a text says which caption of a record is taken. key: for the message."""
    require(
        is_choice(value),
        f"{key}={value}: the number of a caption, 1 for the first, or {DRAWN} is wanted",
    )
