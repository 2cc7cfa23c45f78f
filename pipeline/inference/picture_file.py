"""The picture that `latentmill sample` writes: PNG or JPEG by its name, and how it is told from pictures of others."""

from __future__ import annotations

import io
import warnings
from pathlib import PurePosixPath

from PIL import Image

from pipeline.errors import ConfigError

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
COMMENT = b"latentmill sample"
"""In a JPEG. A PNG is told by the grid's paper margin, so that its bytes depend on pixels alone."""
LARGEST = {"PNG": 2**31 - 1, "JPEG": 65_500}
"""Longest side of each format in pixels."""
MOST_PIXELS = 2**27
"""Pixels of a picture, at most: 0.4 GB."""
QUALITY = 95


def format_of(dest: str) -> str:
    """PNG or JPEG. Raises ConfigError for a name that ends otherwise."""
    suffix = PurePosixPath(dest).suffix.lower()
    if suffix not in FORMATS:
        raise ConfigError(f"dest={dest}: a picture's name ends in {', '.join(FORMATS)}")
    return FORMATS[suffix]


def require_room(kind: str, width: int, height: int) -> None:
    """Raise ConfigError for a picture that is larger than its format, or than memory, allows. kind: PNG or JPEG."""
    if width * height > MOST_PIXELS or max(width, height) > LARGEST[kind]:
        side = f" and {LARGEST[kind]:,} a side" if kind == "JPEG" else ""
        raise ConfigError(
            f"the picture would have {width:,} x {height:,} pixels, and {MOST_PIXELS:,}{side} are the most: ask for "
            "fewer images (n=), fewer captions or a smaller size="
        )


def encoded(picture: Image.Image, kind: str) -> bytes:
    """The bytes of the picture's file. kind: PNG or JPEG."""
    file = io.BytesIO()
    if kind == "PNG":
        picture.save(file, "PNG", optimize=True)
    else:
        picture.save(file, "JPEG", quality=QUALITY, comment=COMMENT)
    return file.getvalue()


def is_ours(data: bytes, margin: int, paper: tuple[int, int, int]) -> bool:
    """Whether an earlier `sample` wrote the file. margin, paper: width and colour of the margin of its grids."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=tuple(LARGEST)) as picture:
                if picture.format == "JPEG":
                    return picture.info.get("comment") == COMMENT
                width, height = picture.size
                if picture.mode != "RGB" or min(width, height) <= 2 * margin or width * height > MOST_PIXELS:
                    return False
                edges = [(0, 0, width, margin), (0, height - margin, width, height)]
                edges += [(0, 0, margin, height), (width - margin, 0, width, height)]
                return all([colour for _, colour in picture.crop(edge).getcolors(1) or ()] == [paper] for edge in edges)
    except Exception:  # whatever Pillow makes of bytes that are no picture
        return False
