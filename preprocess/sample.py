"""One source sample to what the encoders are given, or a reason why not (docs/promises.md, 4)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.config import EncodeConfig
from pipeline.errors import RecordRejected
from preprocess.image import Crop, centre_crop, crop_image, crop_labels, decode_image
from preprocess.source import Sample

MOST_BOXES = 8
LOWRES_FACTOR = 4


@dataclass
class Prepared:
    """A sample ready for the encoders.

    pixels: (R, R, 3) uint8 RGB. ids: L token ids. tokens: the caption's tokens with start and end before truncation.
    conditions: arrays of `cond.*` that need no encoder, by name ("boxes").
    """

    key: str
    caption: str
    ids: list[int]
    tokens: int
    crop: Crop
    pixels: np.ndarray
    conditions: dict[str, np.ndarray] = field(default_factory=dict)

    def meta(self) -> dict[str, Any]:
        """The record's json. crop: left, top and side in pixels of the image after it was resized to `resized`."""
        crop = self.crop
        return {
            "key": self.key,
            "caption": self.caption,
            "tokens": min(self.tokens, len(self.ids)),
            "truncated": self.tokens > len(self.ids),
            "width": crop.width,
            "height": crop.height,
            "resized": list(crop.resized),
            "crop": [crop.left, crop.top, crop.side],
        }


def prepare(sample: Sample, config: EncodeConfig, tokenize: Callable[[str], tuple[list[int], int]]) -> Prepared:
    """Reads, checks and crops one sample. Raises RecordRejected with the first reason found."""
    if sample.problem:
        raise RecordRejected(sample.problem, sample.key)
    data = sample.image()
    text = caption(sample, config.caption_key, config.limits.caption_bytes)
    image = decode_image(data, config.limits.pixels)
    crop = centre_crop(image.width, image.height, config.resolution)
    ids, tokens = tokenize(text)
    prepared = Prepared(sample.key, text, ids, tokens, crop, crop_image(image, crop))
    if "boxes" in config.conditions:
        prepared.conditions["boxes"] = boxes(sample, crop)
    if "labels" in config.conditions:
        if "labels.png" not in sample.members:
            raise RecordRejected("labels_missing")
        prepared.conditions["labels"] = crop_labels(sample.members["labels.png"], crop, config.limits.pixels)
    if "lowres" in config.conditions:
        prepared.conditions["lowres"] = lowres(prepared.pixels)
    return prepared


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
    width, height = crop.resized
    edges = given[:, 1:] * [width, height, width, height] - [crop.left, crop.top, crop.left, crop.top]
    edges = (edges / crop.side).clip(0, 1)
    inside = (edges[:, 2] > edges[:, 0]) & (edges[:, 3] > edges[:, 1])
    kept = np.concatenate([given[inside, :1], edges[inside]], axis=1)
    if len(kept) > MOST_BOXES:
        raise RecordRejected("boxes_too_many", f"{len(kept)}, at most {MOST_BOXES}")
    result = np.full((MOST_BOXES, 5), -1, dtype=np.float16)
    result[: len(kept)] = kept
    return result


def lowres(pixels_HWC: np.ndarray) -> np.ndarray:
    """(R, R, 3) uint8 -> (3, R/4, R/4) uint8: means over 4 x 4 pixels, rounded half up."""
    side = pixels_HWC.shape[0] // LOWRES_FACTOR
    blocks = pixels_HWC.reshape(side, LOWRES_FACTOR, side, LOWRES_FACTOR, 3).astype(np.uint32)
    area = LOWRES_FACTOR**2
    return ((blocks.sum(axis=(1, 3)) + area // 2) // area).astype(np.uint8).transpose(2, 0, 1)


def hole(record_key: str, side: int) -> np.ndarray:
    """The inpainting mask of a record, (side, side) uint8, 1 inside: a rectangle that depends on the record's key
    alone.

    Its sides are uniform between a quarter and three quarters of the image's, its place uniform inside.
    """
    words = np.frombuffer(hashlib.sha256(f"mask {record_key}".encode()).digest(), dtype="<u4").astype(np.uint64)
    shortest, longest = side // 4, side * 3 // 4
    height, width = (shortest + int(word) % (longest - shortest + 1) for word in words[:2])
    top, left = int(words[2]) % (side - height + 1), int(words[3]) % (side - width + 1)
    mask = np.zeros((side, side), dtype=np.uint8)
    mask[top : top + height, left : left + width] = 1
    return mask
