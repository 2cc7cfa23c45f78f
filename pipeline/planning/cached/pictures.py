"""What a few pictures of a source say: their sizes by their headers, and of some the bytes of a PNG of the crop and of
a small JPEG of it. Pillow is imported where a picture is opened."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.config import LimitsConfig
from pipeline.data.format.crops import place_crop
from pipeline.data.format.pixels import png_bytes
from pipeline.planning.cached.beside import THUMBNAIL_SIDE

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("JPEG", "PNG", "WEBP")
ORIENTATION, TURNED = 0x0112, range(5, 9)
"""The tag of EXIF that says how a picture lies, and its values of those that lie on their side."""
QUALITY = 80
"""Of the small JPEGs (preprocess/encoding/census.py)."""


def opened(data: bytes, limits: LimitsConfig) -> Image | None:
    """The picture of a file's bytes, of which the header is read; None for what is none, or has more pixels than
    limits.pixels."""
    from PIL import Image as images

    try:
        picture = images.open(io.BytesIO(data), formats=FORMATS)
    except Exception:  # Pillow raises errors of many kinds for damaged bytes
        return None
    return picture if 0 < picture.width * picture.height <= limits.pixels else None


def upright_size(picture: Image) -> tuple[int, int]:
    """(width, height) of a picture as it is seen."""
    try:
        turned = picture.getexif().get(ORIENTATION, 1) in TURNED
    except Exception:
        turned = False
    return picture.size[::-1] if turned else picture.size


def cropped(picture: Image, size: tuple[int, int], policy: str, seed: int, key: str) -> Image | None:
    """The crop of `size` (width, height), as encode cuts it, but for colour profiles; None for damaged bytes."""
    from PIL import Image as images
    from PIL import ImageOps

    try:
        upright = ImageOps.exif_transpose(picture).convert("RGB")
        crop = place_crop(*upright.size, size, policy, seed, key)
        if upright.size != crop.resized:
            upright = upright.resize(crop.resized, images.Resampling.LANCZOS)
    except Exception:
        return None
    left, top, width, height = crop.box
    return upright.crop((left, top, left + width, top + height))


def png_sizes(crop: Image, variants: int) -> tuple[int, ...]:
    """Bytes of the crop as a PNG, and for two variants of the flipped crop."""
    pixels: np.ndarray[Any, Any] = np.asarray(crop)
    return tuple(len(png_bytes(one)) for one in (pixels, pixels[:, ::-1])[:variants])


def thumbnail_size(crop: Image) -> int:
    """Bytes of a small JPEG of the crop."""
    small, out = crop.copy(), io.BytesIO()
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    small.save(out, "JPEG", quality=QUALITY)
    return out.getbuffer().nbytes
