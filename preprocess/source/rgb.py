"""Turns a decoded picture of any mode into 8-bit RGB, with transparency over white."""

from __future__ import annotations

import numpy as np
from PIL import Image

from pipeline.errors import RecordRejected

WHITE = (255, 255, 255, 255)


def to_rgb(image: Image.Image, depth: int) -> Image.Image:
    """The picture in RGB. depth: bits of a channel in its file; below 8, Pillow has scaled the pixels to 8 bits, but
    not the value that is transparent. Raises RecordRejected, image_unreadable, for a palette without colours."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("P", "PA") and not image.getpalette():
        raise RecordRejected("image_unreadable", "its palette has no colours")
    if image.mode.startswith("I"):
        return _from_16_bit_grey(image)
    if image.mode in ("1", "L", "RGB") and "transparency" in image.info:
        image = _with_scaled_transparency(image, depth)
    if image.mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, WHITE)
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _from_16_bit_grey(image: Image.Image) -> Image.Image:
    """The upper 8 bits of each pixel; white where the value is the transparent one."""
    values = np.asarray(image)
    if values.dtype != np.uint16:
        values = values.clip(0, 65535).astype(np.uint16)
    grey = (values >> 8).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


def _with_scaled_transparency(image: Image.Image, depth: int) -> Image.Image:
    """The picture with its transparent value in the scale of its pixels. Of 16-bit colours the upper 8 bits are
    compared."""
    value = image.info["transparency"]
    if depth == 8 and image.mode != "1":
        return image
    scaled: int | tuple[int, ...]
    if isinstance(value, tuple):
        scaled = tuple(part >> 8 for part in value)
    elif isinstance(value, int):
        most = (1 << depth) - 1
        scaled = (value & most) * 255 // most
    else:
        return image
    converted = image.convert("L") if image.mode == "1" else image
    converted.info["transparency"] = scaled
    return converted
