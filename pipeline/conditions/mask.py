"""cond.mask and cond.masked: the hole of inpainting. There is one polarity: 1 is the hole, 0 is known."""

from __future__ import annotations

import hashlib
from typing import Literal

import numpy as np
from PIL import Image

from pipeline.conditions.draws import Draws
from pipeline.conditions.facts import Kind, MaskFacts
from pipeline.conditions.png import read_png
from pipeline.conditions.strokes import RECIPES, draw_strokes
from pipeline.errors import RecordRejected

WHITE = 128
"""Luma from which a pixel of a mask file is in the hole."""
MODES = ("1", "L", "P", "RGB")


def masks(key: str, size: tuple[int, int], facts: MaskFacts, given: np.ndarray | None = None) -> np.ndarray:
    """The holes of a record: (H, W) uint8, or (facts.variants, H, W) where there are several; 0 or 1.

    key: the record's, from which all draws follow. size: (width, height) of the crop in pixels. given: (H, W) of 0 and
    1, the crop of the sample's own mask, for the kind "file". Raises RecordRejected, mask_missing, where that kind is
    drawn and none is given.
    """
    drawn = []
    for variant in range(facts.variants):
        kind = Draws("mask-kind", key, variant).choice(facts.kinds)
        if kind == "file":
            if given is None:
                raise RecordRejected("mask_missing")
            drawn.append(given.astype(np.uint8))
        else:
            drawn.append(draw_mask(kind, key, size, variant))
    return drawn[0] if facts.variants == 1 else np.stack(drawn)


def draw_mask(kind: Kind, key: str, size: tuple[int, int], variant: int = 0) -> np.ndarray:
    """One hole, (H, W) uint8 of 0 and 1: of strokes (strokes.py), one rectangle, or everything. size: (width, height)
    in pixels."""
    if kind in RECIPES:
        return draw_strokes(kind, key, size, variant)
    if kind == "all":
        return np.ones(size[::-1], dtype=np.uint8)
    assert kind == "rectangles", f"a mask of kind {kind} is not drawn"
    mask = np.zeros(size[::-1], dtype=np.uint8)
    (left, width), (top, height) = _rectangle(key, size, variant)
    mask[top : top + height, left : left + width] = 1
    return mask


def _rectangle(key: str, size: tuple[int, int], variant: int) -> list[tuple[int, int]]:
    """Start and length along x and along y of a rectangle: the lengths are uniform between a quarter and three quarters
    of the crop's, the place is uniform. Variant 0 is the rectangle of caches that had no variants."""
    text = f"rectangle {key} {variant}" if variant else f"mask {key}"
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    words = [int.from_bytes(digest[4 * i : 4 * i + 4], "little") for i in range(4)]
    spans = []
    for length_word, place_word, side in zip(words[::2], words[1::2], size):
        shortest, longest = side // 4, side * 3 // 4
        length = shortest + length_word % (longest - shortest + 1)
        spans.append((place_word % (side - length + 1), length))
    return spans


# --------------------------------------------------------------------------------------------------------------------
# What is stored, and what a model sees


def pack(mask: np.ndarray) -> np.ndarray:
    """(..., H, W) of 0 and 1 -> (..., H, ceil(W / 8)) uint8: eight pixels to a byte, the first in the highest bit."""
    return np.packbits(mask, axis=-1)


def unpack(packed: np.ndarray, width: int) -> np.ndarray:
    """(..., H, ceil(width / 8)) uint8 -> (..., H, width) uint8 of 0 and 1."""
    return np.unpackbits(packed, axis=-1, count=width)


def flip(mask: np.ndarray) -> np.ndarray:
    """Unpacked masks (..., H, W) with left and right exchanged."""
    return np.ascontiguousarray(mask[..., ::-1])


def pool(mask: np.ndarray, factor: int, how: Literal["max", "nearest"]) -> np.ndarray:
    """Unpacked masks (..., H, W) -> (..., H / factor, W / factor): a value for each latent position.

    factor: pixels per latent position along a side; it divides H and W. max: 1 where any pixel is in the hole. nearest:
    the first pixel of each cell, as Stable Diffusion and diffusers resize masks; a cell may then count as known though
    some of its pixels are hidden.
    """
    height, width = mask.shape[-2:]
    assert height % factor == 0 and width % factor == 0, f"{width} x {height} pixels are no multiple of {factor}"
    if how == "nearest":
        return np.ascontiguousarray(mask[..., ::factor, ::factor])
    cells = mask.reshape(*mask.shape[:-2], height // factor, factor, width // factor, factor)
    return cells.max(axis=(-3, -1))


def hide(pixels_HWC: np.ndarray, mask_HW: np.ndarray, colour: Literal["grey", "black"]) -> np.ndarray:
    """(H, W, 3) uint8 -> (H, W, 3) float32 in [-1, 1] with the hole filled: exactly 0 where grey, exactly -1 where
    black. Outside of it, pixels / 127.5 - 1."""
    images = pixels_HWC.astype(np.float32) / np.float32(127.5) - np.float32(1)
    return np.where(mask_HW[..., None] > 0, np.float32(0 if colour == "grey" else -1), images)


# --------------------------------------------------------------------------------------------------------------------
# Masks of files


def mask_map(image: Image.Image) -> np.ndarray:
    """The hole of a mask's picture, (H, W) uint8: 1 where it is white (luma of 128 or more), 0 where it is black.
    Raises RecordRejected, mask_unreadable, for 16-bit greys and for transparency, which has no polarity."""
    if image.mode not in MODES or "transparency" in image.info:
        what = "transparency" if image.mode in ("LA", "PA", "RGBA") or image.mode in MODES else f"mode {image.mode}"
        raise RecordRejected("mask_unreadable", f"it has {what}; 8-bit black and white is wanted, white is the hole")
    return (np.asarray(image.convert("L")) >= WHITE).astype(np.uint8)


def mask_of_file(data: bytes, where: str = "mask") -> np.ndarray:
    """The hole of a PNG, (H, W) uint8 of 0 and 1, white being the hole; for sampling. where: its name, for messages.
    Raises ConfigError."""
    return read_png(data, where, "a PNG of black and white", lambda image, _: mask_map(image))
