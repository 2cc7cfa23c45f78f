"""Turns a decoded picture of any mode into 8-bit RGB, with transparency over white."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

from pipeline.errors import RecordRejected

WHITE = (255, 255, 255, 255)
Convert = Callable[[Image.Image], Image.Image]
"""Makes RGB of straight colours: of a picture of mode RGB, L or CMYK."""


def to_rgb(image: Image.Image, depth: int, convert: Convert | None = None) -> Image.Image:
    """The picture in RGB. depth: bits of a channel in its file; below 8, Pillow has scaled the pixels to 8 bits, but
    not the value that is transparent. convert: how colours become those of sRGB; None: as Pillow has it. Transparency
    is laid over white afterwards. Raises RecordRejected, image_unreadable, for a palette without colours."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return convert(image) if convert else image
    if image.mode in ("P", "PA") and not image.getpalette():
        raise RecordRejected("image_unreadable", "its palette has no colours")
    if image.mode.startswith("I"):
        return _from_16_bit_grey(image, convert)
    if image.mode in ("1", "L", "RGB") and "transparency" in image.info:
        image = _with_scaled_transparency(image, depth)
    if image.mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    is_grey = image.mode in ("1", "L", "LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if convert:
            colours = convert(image.getchannel(0) if is_grey else image.convert("RGB"))
            colours.putalpha(image.getchannel(3))
            image = colours
        white = Image.new("RGBA", image.size, WHITE)
        return Image.alpha_composite(white, image).convert("RGB")
    if convert:
        mode = "L" if is_grey else "CMYK" if image.mode == "CMYK" else "RGB"
        return convert(image if image.mode == mode else image.convert(mode))
    return image.convert("RGB")


def _from_16_bit_grey(image: Image.Image, convert: Convert | None) -> Image.Image:
    """The upper 8 bits of each pixel; white where the value is the transparent one."""
    values = np.asarray(image)
    if values.dtype != np.uint16:
        values = values.clip(0, 65535).astype(np.uint16)
    grey = Image.fromarray((values >> 8).astype(np.uint8))
    rgb = convert(grey) if convert else grey.convert("RGB")
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        rgb.paste(WHITE[:3], (0, 0), Image.fromarray(values == transparent))
    return rgb


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
