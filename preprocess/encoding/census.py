"""Counts over the accepted samples of one unit, for the dataset card."""

from __future__ import annotations

import base64
import collections
import io
import math
from dataclasses import dataclass, field, fields
from typing import Any

from PIL import Image

from pipeline.conditions.facts import ClassFacts
from preprocess.source.sample import Picture, Prepared

ASPECT_STEP = 0.25  # width of a bin of log2(width / height)
SIDE_STEP = 0.5  # width of a bin of log2(shorter side)
TOKEN_STEP = 4  # tokens in a bin
THUMBNAIL = 96  # pixels, longer side
THUMBNAILS = 4  # per input shard


@dataclass
class Census:
    """Histograms over accepted samples: bin number -> count. A bin begins at its number times its step; a bin of
    aspects has its middle there.

    aspects: log2(width / height) of the originals. sides: log2 of the shorter side of the originals in pixels.
    tokens: tokens of the captions before truncation. sizes: samples by "WIDTHxHEIGHT" of their crop (first target).
    classes: samples by class, where they have one.
    """

    aspects: collections.Counter[int] = field(default_factory=collections.Counter)
    sides: collections.Counter[int] = field(default_factory=collections.Counter)
    tokens: collections.Counter[int] = field(default_factory=collections.Counter)
    sizes: collections.Counter[str] = field(default_factory=collections.Counter)
    classes: collections.Counter[int] = field(default_factory=collections.Counter)

    def add(self, sample: Prepared, target: int) -> None:
        """Counts one accepted sample as dataset number `target` holds it."""
        width, height = sample.size
        self.aspects[math.floor(math.log2(width / height) / ASPECT_STEP + 0.5)] += 1
        self.sides[math.floor(math.log2(min(sample.size)) / SIDE_STEP)] += 1
        for caption in sample.captions:
            self.tokens[caption.tokens // TOKEN_STEP] += 1
        number = sample.pictures[target].conditions.get("class")
        if number is not None:
            self.classes[int(number)] += 1
        across, down = sample.pictures[target].crop.size
        self.sizes[f"{across}x{down}"] += 1

    def to_json(self) -> dict[str, Any]:
        """What from_json takes; without `classes` where there are none."""
        counts = {f.name: {str(key): count for key, count in getattr(self, f.name).items()} for f in fields(self)}
        return counts if self.classes else {name: bins for name, bins in counts.items() if name != "classes"}


def census_from_json(value: dict[str, Any]) -> Census:
    """The census that to_json gave. Raises ValueError, KeyError, TypeError."""
    numbers = {
        name: collections.Counter({int(bin_): count for bin_, count in value.get(name, {}).items()})
        for name in ("aspects", "sides", "tokens", "classes")
    }
    return Census(**numbers, sizes=collections.Counter(value["sizes"]))


def class_words(picture: Picture, facts: ClassFacts | None) -> str:
    """The class of a picture in words, "" where it has none: its name, or its number."""
    number = picture.conditions.get("class")
    if number is None or facts is None:
        return ""
    return facts.names[int(number)] if facts.names else f"class {int(number)}"


def thumbnail(sample: Prepared, target: int) -> str:
    """A small JPEG of the crop, THUMBNAIL pixels at most, in base64."""
    image = Image.fromarray(sample.pictures[target].pixels)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=80)
    return base64.b64encode(out.getvalue()).decode()
