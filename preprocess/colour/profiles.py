"""Colour profiles (ICC.1:2022) that are embedded in untrusted pictures, and the conversion of pixels to sRGB.

LittleCMS converts, in 8 bits, with relative colorimetric intent and black point compensation; of profiles of a matrix
all intents are the same. A profile that moves no colour by more than NEAR of 255 is sRGB in another spelling, and
changes nothing. One that cannot be used (damaged, too large, of another kind of picture) says nothing: its picture is
taken as sRGB, or as Pillow converts it, as a picture without a profile is, and counted.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageCms, features

Outcome = Literal["", "applied", "srgb", "unusable"]
"""What became of a picture's profile; "" of a picture without one."""
MOST_BYTES = 4 * 1024 * 1024
"""Of a profile; those of printing presses have 0.5 to 2.5 MB."""
HEADER_BYTES, MOST_TAGS = 128, 100
CLASSES = (b"scnr", b"mntr", b"prtr", b"spac")
"""Kinds of profiles that say what colours numbers are: of input, display and output devices, and of colour spaces."""
CONNECTIONS = (b"XYZ ", b"Lab ")
SPACES = {b"RGB ": "RGB", b"GRAY": "L", b"CMYK": "CMYK"}
"""Pillow's mode of the pixels that a profile is for."""
NEAR = 2
LEVELS = 9  # of a channel, among the colours by which a profile is compared with sRGB
FLAGS = ImageCms.Flags.BLACKPOINTCOMPENSATION
KEPT = 32  # conversions that a process keeps, as most pictures have one of few profiles


def library() -> str:
    """The version of LittleCMS, on which the pixels depend; "" where Pillow was built without it."""
    return features.version("littlecms2") or ""


@dataclass
class Profile:
    """The profile of one picture, b"" of one that could not be read. outcome: what became of it, once it is applied."""

    data: bytes
    outcome: Outcome = ""

    def to_srgb(self, image: Image.Image) -> Image.Image:
        """Straight colours (mode RGB, L or CMYK) as RGB."""
        convert, self.outcome = _conversion(self.data, image.mode)
        if convert is not None:
            return convert(image)
        return image if image.mode == "RGB" else image.convert("RGB")


def profile_of(info: Mapping[Any, Any]) -> Profile | None:
    """The profile in the `info` of an opened picture; None without any."""
    if "icc_profile" not in info:
        return None
    data = info["icc_profile"]
    return Profile(data if isinstance(data, bytes) else b"")


def space(profile: bytes) -> str:
    """The mode of pixels that a profile is for, according to its header; "" for what is no usable profile."""
    if not HEADER_BYTES + 4 <= len(profile) <= MOST_BYTES or profile[36:40] != b"acsp":
        return ""
    size, tags = (int.from_bytes(profile[at : at + 4], "big") for at in (0, HEADER_BYTES))
    if size > len(profile) or tags > MOST_TAGS:
        return ""
    if profile[12:16] not in CLASSES or profile[20:24] not in CONNECTIONS:
        return ""
    return SPACES.get(profile[16:20], "")


@functools.lru_cache(maxsize=KEPT)
def _conversion(profile: bytes, mode: str) -> tuple[Callable[[Image.Image], Image.Image] | None, Outcome]:
    """What converts pictures of a mode by a profile; None where there is nothing to do."""
    own = space(profile)
    if not own or (own != mode and (mode, own) != ("L", "RGB")):
        return None, "unusable"
    try:
        if mode == "L":
            tables = _grey_tables(profile, own)
            near = all(abs(value - grey) <= NEAR for table in tables for grey, value in enumerate(table))
            return (None, "srgb") if near else (lambda image: _looked_up(image, tables), "applied")
        transform = _transform(profile, own, FLAGS)
        near = mode == "RGB" and _is_srgb(transform)
        return (None, "srgb") if near else (lambda image: _applied(transform, image), "applied")
    except MemoryError:
        raise
    except Exception:  # whatever LittleCMS has against it
        return None, "unusable"


def _transform(profile: bytes, mode: str, flags: ImageCms.Flags) -> ImageCms.ImageCmsTransform:
    """LittleCMS's conversion of pixels of a mode to sRGB. Raises what it raises."""
    return ImageCms.ImageCmsTransform(
        ImageCms.ImageCmsProfile(io.BytesIO(profile)),
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")),
        mode,
        "RGB",
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
        flags=flags,
    )


def _applied(transform: ImageCms.ImageCmsTransform, image: Image.Image) -> Image.Image:
    converted = Image.new("RGB", image.size)
    transform.transform.apply(image.getim(), converted.getim())
    return converted


def _grey_tables(profile: bytes, own: str) -> list[list[int]]:
    """Red, green and blue of each of the 256 greys, as numbers of a profile of greys or of colours. A table is exact,
    where LittleCMS would interpolate a picture's greys between a few."""
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    exact = _applied(_transform(profile, own, FLAGS | ImageCms.Flags.NOOPTIMIZE), ramp.convert(own))
    return [list(exact.getchannel(channel).tobytes()) for channel in range(3)]


def _looked_up(image: Image.Image, tables: list[list[int]]) -> Image.Image:
    return Image.merge("RGB", [image.point(table) for table in tables])


def _is_srgb(transform: ImageCms.ImageCmsTransform) -> bool:
    """Whether a conversion of colours leaves greys, and a grid of all colours, as they are, but for NEAR."""
    greys = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
    levels = np.linspace(0, 255, LEVELS).round().astype(np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(-1, 3)
    colours = np.concatenate([greys, grid])
    moved = np.asarray(_applied(transform, Image.fromarray(colours[None])))[0].astype(np.int16) - colours
    return bool(np.abs(moved).max() <= NEAR)
