"""One source sample to what the encoders are given, or a reason why not (docs/explained/promises.md, 4)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.config import FiltersConfig
from pipeline.config.values.rules import parse_rules
from pipeline.errors import RecordRejected
from preprocess.source.image import Crop, crop_image, crop_labels, decode_image, open_image, place_crop
from preprocess.source.recipe import Recipe
from preprocess.source.shard import Sample

MOST_BOXES = 8
LOWRES_FACTOR = 4
DIGEST_BYTES = 16
FILTERED = "filter:"  # begins the reasons of rejects that are whole but not wanted


@dataclass
class Picture:
    """A sample's image at one target.

    bucket: number of its size among the target's. pixels: (height, width, 3) uint8 RGB. conditions: arrays of `cond.*`
    that need no encoder, by name ("boxes").
    """

    bucket: int
    crop: Crop
    pixels: np.ndarray
    conditions: dict[str, np.ndarray] = field(default_factory=dict)

    def flipped(self) -> Picture:
        """Left and right exchanged. Its crop stays that of the image as it was."""
        conditions = dict(self.conditions)
        for name in conditions.keys() & {"labels", "lowres"}:
            conditions[name] = np.ascontiguousarray(conditions[name][..., ::-1])
        if "boxes" in conditions:
            boxes = conditions["boxes"].copy()
            there = boxes[:, 0] >= 0
            boxes[there, 1], boxes[there, 3] = 1 - boxes[there, 3], 1 - boxes[there, 1]
            conditions["boxes"] = boxes
        return Picture(self.bucket, self.crop, self.pixels[:, ::-1], conditions)


@dataclass
class Prepared:
    """A sample ready for the encoders.

    ids: L token ids. tokens: the caption's tokens with start and end before truncation. size: the upright original's
    (width, height). digest: what equal samples share, b"" when duplicates are kept. pictures: one for each target.
    """

    key: str
    caption: str
    ids: list[int]
    tokens: int
    size: tuple[int, int]
    digest: bytes
    pictures: list[Picture]

    def meta(self, target: int = 0, *, flipped: bool = False) -> dict[str, Any]:
        """The json of its record. crop: left, top, width and height in pixels of the image after it was resized to
        `resized`, before any flip."""
        crop = self.pictures[target].crop
        meta = {
            "key": self.key,
            "caption": self.caption,
            "tokens": min(self.tokens, len(self.ids)),
            "truncated": self.tokens > len(self.ids),
            "width": crop.width,
            "height": crop.height,
            "resized": list(crop.resized),
            "crop": list(crop.box),
        }
        return meta | ({"flipped": True} if flipped else {})


def prepare(sample: Sample, recipe: Recipe, tokenize: Callable[[str], tuple[list[int], int]]) -> Prepared:
    """Reads, checks and crops one sample. Raises RecordRejected with the first reason found."""
    if sample.problem:
        raise RecordRejected(sample.problem, sample.key)
    data = sample.image()
    text = caption(sample, recipe.caption_key, recipe.limits.caption_bytes)
    refuse_unwanted(sample, text, recipe.filters)
    opened = open_image(data, recipe.limits)
    refuse_size(opened.size, recipe.filters)
    image = decode_image(opened, data)
    ids, tokens = tokenize(text)
    pictures = []
    for target in recipe.targets:
        bucket = target.nearest(*image.size)
        crop = place_crop(*image.size, target.sizes[bucket], recipe.crop, recipe.seed, sample.key)
        pictures.append(Picture(bucket, crop, crop_image(image, crop)))
        pictures[-1].conditions = conditions(sample, recipe, pictures[-1])
    return Prepared(
        sample.key, text, ids, tokens, image.size, content_digest(data, text, recipe.filters.duplicates), pictures
    )


def refuse_unwanted(sample: Sample, text: str, filters: FiltersConfig) -> None:
    """Raises RecordRejected when a filter on the caption or the json says so: filter:min_caption, filter:max_caption,
    filter:RULE, and column_missing:KEY."""
    if len(text) < filters.min_caption:
        raise RecordRejected(f"{FILTERED}min_caption")
    if filters.max_caption and len(text) > filters.max_caption:
        raise RecordRejected(f"{FILTERED}max_caption")
    columns = metadata(sample) if filters.keep else {}
    for rule in parse_rules(filters.keep):
        holds = rule.holds(columns.get(rule.key))
        if holds is None:
            raise RecordRejected(f"column_missing:{rule.key}", "it is not there, or cannot be compared")
        if not holds:
            raise RecordRejected(f"{FILTERED}{rule}")


def refuse_size(size: tuple[int, int], filters: FiltersConfig) -> None:
    """Raises RecordRejected: filter:min_side, filter:max_aspect."""
    if min(size) < filters.min_side:
        raise RecordRejected(f"{FILTERED}min_side")
    if filters.max_aspect and max(size) > filters.max_aspect * min(size):
        raise RecordRejected(f"{FILTERED}max_aspect")


def content_digest(data: bytes, text: str, duplicates: str) -> bytes:
    """What two samples share when one of them is a duplicate: a hash of DIGEST_BYTES, b"" when duplicates are kept."""
    if duplicates == "keep":
        return b""
    digest = hashlib.sha256(data)
    if duplicates == "pair":
        digest.update(b"\0" + text.encode())
    return digest.digest()[:DIGEST_BYTES]


def caption(sample: Sample, where: str, most_bytes: int) -> str:
    """The sample's caption, without white space around it. where: "txt" or "json:KEY". Raises RecordRejected."""
    if where == "txt":
        if "txt" not in sample.members:
            raise RecordRejected("caption_missing")
        data = sample.members["txt"]
    else:
        found = metadata(sample).get(where.removeprefix("json:"))
        if found is None:
            raise RecordRejected("caption_missing")
        if not isinstance(found, str):
            raise RecordRejected("caption_not_text")
        data = found.encode("utf-8", "surrogatepass")
    if len(data) > most_bytes:
        raise RecordRejected("caption_too_long", f"{len(data)} bytes")
    try:
        text = data.decode("utf-8").strip()
    except UnicodeDecodeError:
        raise RecordRejected("caption_bad_utf8") from None
    if not text:
        raise RecordRejected("caption_empty")
    return text


def metadata(sample: Sample) -> dict[str, Any]:
    """The sample's json object, {} when it has none. Raises RecordRejected("json_unreadable")."""
    if "json" not in sample.members:
        return {}
    try:
        found = json.loads(sample.members["json"])
    except (ValueError, RecursionError):
        raise RecordRejected("json_unreadable") from None
    if not isinstance(found, dict):
        raise RecordRejected("json_unreadable", "it is not an object")
    return found


# --------------------------------------------------------------------------------------------------------------------
# Conditions


def conditions(sample: Sample, recipe: Recipe, picture: Picture) -> dict[str, np.ndarray]:
    """The conditions that need no encoder. Raises RecordRejected."""
    found = {}
    if "boxes" in recipe.conditions:
        found["boxes"] = boxes(sample, picture.crop)
    if "labels" in recipe.conditions:
        if "labels.png" not in sample.members:
            raise RecordRejected("labels_missing")
        found["labels"] = crop_labels(sample.members["labels.png"], picture.crop, recipe.limits)
    if "lowres" in recipe.conditions:
        found["lowres"] = lowres(picture.pixels)
    return found


def boxes(sample: Sample, crop: Crop) -> np.ndarray:
    """The json's `boxes` [[class, x0, y0, x1, y1], ...], edges as fractions of the image, as fractions of the crop.

    Returns (MOST_BOXES, 5) float16; boxes outside the crop are gone, rows beyond the last are -1. Raises
    RecordRejected: boxes_missing, boxes_unreadable, boxes_too_many.
    """
    found = metadata(sample).get("boxes")
    if found is None:
        raise RecordRejected("boxes_missing")
    try:
        given = np.array(found, dtype=np.float64).reshape(-1, 5)
    except (ValueError, TypeError):
        raise RecordRejected("boxes_unreadable") from None
    if not np.isfinite(given).all() or (given[:, 0] < 0).any() or (given[:, 0] > 2048).any():
        raise RecordRejected("boxes_unreadable", "a class outside 0 to 2048, or an edge that is not a number")
    resized, (left, top, width, height) = np.array(crop.resized * 2), crop.box
    edges = given[:, 1:] * resized - [left, top, left, top]
    edges = (edges / [width, height, width, height]).clip(0, 1)
    inside = (edges[:, 2] > edges[:, 0]) & (edges[:, 3] > edges[:, 1])
    kept = np.concatenate([given[inside, :1], edges[inside]], axis=1)
    if len(kept) > MOST_BOXES:
        raise RecordRejected("boxes_too_many", f"{len(kept)}, at most {MOST_BOXES}")
    result = np.full((MOST_BOXES, 5), -1, dtype=np.float16)
    result[: len(kept)] = kept
    return result


def lowres(pixels_HWC: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 -> (3, H/4, W/4) uint8: means over 4 x 4 pixels, rounded half up."""
    height, width = (side // LOWRES_FACTOR for side in pixels_HWC.shape[:2])
    whole = pixels_HWC[: height * LOWRES_FACTOR, : width * LOWRES_FACTOR]
    blocks = whole.reshape(height, LOWRES_FACTOR, width, LOWRES_FACTOR, 3).astype(np.uint32)
    area = LOWRES_FACTOR**2
    return ((blocks.sum(axis=(1, 3)) + area // 2) // area).astype(np.uint8).transpose(2, 0, 1)


def hole(record_key: str, size: tuple[int, int]) -> np.ndarray:
    """The inpainting mask of a record whose crop is `size` (width, height), (height, width) uint8, 1 inside: a
    rectangle that depends on the record's key alone.

    Its sides are uniform between a quarter and three quarters of the image's, its place uniform inside.
    """
    words = np.frombuffer(hashlib.sha256(f"mask {record_key}".encode()).digest(), dtype="<u4").astype(np.uint64)
    (left, width), (top, height) = (
        _span(int(words[2 * i]), int(words[2 * i + 1]), side) for i, side in enumerate(size)
    )
    mask = np.zeros(size[::-1], dtype=np.uint8)
    mask[top : top + height, left : left + width] = 1
    return mask


def _span(length_word: int, place_word: int, side: int) -> tuple[int, int]:
    """Start and length of a span inside [0, side)."""
    shortest, longest = side // 4, side * 3 // 4
    length = shortest + length_word % (longest - shortest + 1)
    return place_word % (side - length + 1), length
