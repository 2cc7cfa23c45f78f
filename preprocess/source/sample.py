"""Turns one source sample into the input of the encoders, or into a reason of rejection (docs/explained/promises.md,
4)."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.config import FiltersConfig
from pipeline.config.values.rules import parse_rules
from pipeline.data.format.members import LOWRES_FACTOR
from pipeline.errors import RecordRejected
from preprocess.source.columns import read_boxes, read_columns
from preprocess.source.image import (
    MOST_CROPS,
    Crop,
    crop_image,
    crop_labels,
    decode_image,
    open_image,
    place_crop,
    refuse_resized,
)
from preprocess.source.recipe import Recipe
from preprocess.source.shard import PROBLEMS, Sample

MOST_BOXES = 8
DIGEST_BYTES = 16
BYTE_ORDER_MARK = "\ufeff"
INVISIBLE = frozenset(["Cc", "Cf", "Mn", "Me"])  # Unicode categories that show nothing by themselves
BLANK = frozenset("\u115f\u1160\u2800\u3164\uffa0")  # letters that are blank
NO_WORDS = 2  # tokens of a caption without words: start and end
FILTERED = "filter:"  # prefix of the reasons of intact samples that a filter rejects


@dataclass
class Picture:
    """The image of a sample for one target.

    bucket: index of its size in the target's sizes. pixels: (height, width, 3) uint8 RGB. conditions: the arrays of
    `cond.*` that need no encoder, by name ("boxes").
    """

    bucket: int
    crop: Crop
    pixels: np.ndarray
    conditions: dict[str, np.ndarray] = field(default_factory=dict)

    def flipped(self) -> Picture:
        """The picture with left and right exchanged. Its crop still refers to the image that was not flipped."""
        conditions = dict(self.conditions)
        for name in conditions.keys() & {"labels", "lowres"}:
            conditions[name] = np.ascontiguousarray(conditions[name][..., ::-1])
        if "boxes" in conditions:
            boxes = conditions["boxes"].copy()
            used_rows = boxes[:, 0] >= 0
            boxes[used_rows, 1], boxes[used_rows, 3] = 1 - boxes[used_rows, 3], 1 - boxes[used_rows, 1]
            conditions["boxes"] = boxes
        return Picture(self.bucket, self.crop, self.pixels[:, ::-1], conditions)


@dataclass
class Prepared:
    """A sample ready for the encoders.

    ids: L token ids. tokens: number of tokens of the caption with start and end, before truncation. size: (width,
    height) of the upright original in pixels. digest: equal for duplicates, b"" when duplicates are kept. pictures: one
    per target.
    """

    key: str
    caption: str
    ids: list[int]
    tokens: int
    size: tuple[int, int]
    digest: bytes
    pictures: list[Picture]

    def meta(self, target: int = 0, *, flipped: bool = False) -> dict[str, Any]:
        """The json of the record. Its crop is (left, top, width, height) in pixels of the image after resizing to
        `resized` and before any flip."""
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
    """Reads, checks and crops one sample. Raises RecordRejected with the first reason that applies."""
    if sample.problem:
        raise RecordRejected(sample.problem, PROBLEMS[sample.problem])
    data = sample.image()
    text = caption(sample, recipe.caption_key, recipe.limits.caption_bytes)
    refuse_unwanted(sample, text, recipe.filters)
    opened = open_image(data, recipe.limits)
    refuse_size(opened.size, recipe.filters)
    refuse_thin(opened.size, sample.key, recipe)
    ids, tokens = tokenize(text)
    if tokens <= NO_WORDS:
        raise RecordRejected("caption_empty", "it has no token")
    image = decode_image(opened, data)
    pictures = []
    for bucket, crop in crops(image.size, sample.key, recipe):
        refuse_resized(crop, recipe.limits)
        pictures.append(Picture(bucket, crop, crop_image(image, crop)))
        pictures[-1].conditions = conditions(sample, recipe, pictures[-1])
    return Prepared(
        sample.key, text, ids, tokens, image.size, content_digest(data, text, recipe.filters.duplicates), pictures
    )


def crops(size: tuple[int, int], key: str, recipe: Recipe) -> Iterator[tuple[int, Crop]]:
    """Bucket and crop for each target of an upright image of `size` (width, height)."""
    for target in recipe.targets:
        bucket = target.nearest(*size)
        yield bucket, place_crop(*size, target.sizes[bucket], recipe.crop, recipe.seed, key)


def refuse_thin(size: tuple[int, int], key: str, recipe: Recipe) -> None:
    """Raises RecordRejected, image_too_large, for an image that is too thin to be resized, whichever way up it is;
    before any pixel is decoded."""
    if max(size) <= MOST_CROPS * min(size):
        return
    try:
        for _, crop in crops(size, key, recipe):
            refuse_resized(crop, recipe.limits)
    except RecordRejected as rejection:
        try:
            for _, crop in crops(size[::-1], key, recipe):
                refuse_resized(crop, recipe.limits)
        except RecordRejected:
            raise rejection from None


def refuse_unwanted(sample: Sample, text: str, filters: FiltersConfig) -> None:
    """Raises RecordRejected for a sample that a filter on the caption or the json excludes: filter:min_caption,
    filter:max_caption, filter:RULE or column_missing:KEY."""
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
    """Raises RecordRejected for a size (width, height) that a filter excludes: filter:min_side or filter:max_aspect."""
    if min(size) < filters.min_side:
        raise RecordRejected(f"{FILTERED}min_side")
    if filters.max_aspect and max(size) > filters.max_aspect * min(size):
        raise RecordRejected(f"{FILTERED}max_aspect")


def content_digest(data: bytes, text: str, duplicates: str) -> bytes:
    """A hash of DIGEST_BYTES that duplicates have in common, or b"" when duplicates are kept."""
    if duplicates == "keep":
        return b""
    digest = hashlib.sha256(data)
    if duplicates == "pair":
        digest.update(b"\0" + text.encode())
    return digest.digest()[:DIGEST_BYTES]


def caption(sample: Sample, where: str, most_bytes: int) -> str:
    """The caption of a sample without surrounding white space. where: "txt" or "json:KEY". Raises RecordRejected."""
    if where == "txt":
        if "txt" not in sample.members:
            raise RecordRejected("caption_missing", sample.files)
        data = sample.members["txt"]
    else:
        value = metadata(sample).get(where.removeprefix("json:"))
        if value is None:
            raise RecordRejected("caption_missing", sample.files)
        if not isinstance(value, str):
            raise RecordRejected("caption_not_text")
        data = value.encode("utf-8", "surrogatepass")
    if len(data) > most_bytes:
        raise RecordRejected("caption_too_long", f"{len(data)} bytes, limits.caption_bytes={most_bytes}")
    try:
        text = data.decode("utf-8").replace("\0", "").strip().removeprefix(BYTE_ORDER_MARK).strip()
    except UnicodeDecodeError:
        raise RecordRejected("caption_bad_utf8") from None
    if not any(map(_is_visible, text)):
        raise RecordRejected("caption_empty")
    return text


def _is_visible(character: str) -> bool:
    """Whether a character shows something by itself."""
    blank = character.isspace() or character in BLANK
    return not blank and unicodedata.category(character) not in INVISIBLE


def metadata(sample: Sample) -> dict[str, Any]:
    """The json object of a sample, {} when it has none. Raises RecordRejected: json_unreadable."""
    return read_columns(sample.members["json"]) if "json" in sample.members else {}


# --------------------------------------------------------------------------------------------------------------------
# Conditions


def conditions(sample: Sample, recipe: Recipe, picture: Picture) -> dict[str, np.ndarray]:
    """The conditions of a picture that need no encoder, by name. Raises RecordRejected."""
    arrays = {}
    if "boxes" in recipe.conditions:
        arrays["boxes"] = boxes(sample, picture.crop)
    if "labels" in recipe.conditions:
        if "labels.png" not in sample.members:
            raise RecordRejected("labels_missing")
        arrays["labels"] = crop_labels(sample.members["labels.png"], picture.crop, recipe.limits)
    if "lowres" in recipe.conditions:
        arrays["lowres"] = lowres(picture.pixels)
    return arrays


def boxes(sample: Sample, crop: Crop) -> np.ndarray:
    """Converts `boxes` of the json, [[class, x0, y0, x1, y1], ...] with edges as fractions of the image, to fractions
    of the crop.

    Returns (MOST_BOXES, 5) float16 without the boxes outside the crop; unused rows are -1. Raises RecordRejected:
    boxes_missing, boxes_unreadable or boxes_too_many.
    """
    boxes_in_image = read_boxes(metadata(sample).get("boxes"))
    resized, (left, top, width, height) = np.array(crop.resized * 2), crop.box
    edges = boxes_in_image[:, 1:] * resized - [left, top, left, top]
    edges = (edges / [width, height, width, height]).clip(0, 1)
    inside = (edges[:, 2] > edges[:, 0]) & (edges[:, 3] > edges[:, 1])
    kept = np.concatenate([boxes_in_image[inside, :1], edges[inside]], axis=1)
    if len(kept) > MOST_BOXES:
        raise RecordRejected("boxes_too_many", f"{len(kept)}, at most {MOST_BOXES}")
    result = np.full((MOST_BOXES, 5), -1, dtype=np.float16)
    result[: len(kept)] = kept
    return result


def lowres(pixels_HWC: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 -> (3, H/4, W/4) uint8: means over blocks of 4 x 4 pixels, rounded half up."""
    height, width = (side // LOWRES_FACTOR for side in pixels_HWC.shape[:2])
    cropped = pixels_HWC[: height * LOWRES_FACTOR, : width * LOWRES_FACTOR]
    blocks = cropped.reshape(height, LOWRES_FACTOR, width, LOWRES_FACTOR, 3).astype(np.uint32)
    area = LOWRES_FACTOR**2
    return ((blocks.sum(axis=(1, 3)) + area // 2) // area).astype(np.uint8).transpose(2, 0, 1)


def hole(record_key: str, size: tuple[int, int]) -> np.ndarray:
    """The inpainting mask of a record whose crop is `size` (width, height): (height, width) uint8, 1 inside a rectangle
    that depends on the record's key alone.

    The sides of the rectangle are uniform between a quarter and three quarters of the crop's; its place is uniform.
    """
    words = np.frombuffer(hashlib.sha256(f"mask {record_key}".encode()).digest(), dtype="<u4").astype(np.uint64)
    (left, width), (top, height) = (
        _span(int(words[2 * i]), int(words[2 * i + 1]), side) for i, side in enumerate(size)
    )
    mask = np.zeros(size[::-1], dtype=np.uint8)
    mask[top : top + height, left : left + width] = 1
    return mask


def _span(length_word: int, place_word: int, side: int) -> tuple[int, int]:
    """Returns start and length of a span inside [0, side)."""
    shortest, longest = side // 4, side * 3 // 4
    length = shortest + length_word % (longest - shortest + 1)
    return place_word % (side - length + 1), length
