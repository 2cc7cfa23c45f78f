"""Files that `sample` is given, read strictly: they may come from anybody.

Sizes are read off headers before a pixel is decoded. What is wrong is refused in one line that names the key and the
file.
"""

from __future__ import annotations

import io
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageOps

from pipeline.errors import ConfigError, NotFound
from pipeline.parsing.text import one_line
from pipeline.storage.urls import open_storage, split_url, without_folders

FORMATS = ("PNG", "JPEG", "WEBP")
MOST_BYTES = 64 * 2**20
MOST_PIXELS = 2**25
"""Pixels of a file, at most: 8,192 x 4,096."""
MOST_SCANS = 100
"""Scans of a JPEG, at most: encoders write 20, and each costs as much as a whole decoding."""
PNG_START = b"\x89PNG\r\n\x1a\n"
EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
"""Pillow's modes of at most 8 bits a channel."""


def called(url: str) -> str:
    """A file's name in messages and labels: without the folders of a local path, and without secrets."""
    return without_folders(url).rpartition("/")[2] or without_folders(url)


def read_file(key: str, url: str) -> bytes:
    """The bytes of a local file or object. Raises ConfigError where there is none, or more than MOST_BYTES."""
    root, name = split_url(url)
    storage = open_storage(root)
    try:
        size = storage.stat(name).size
        if size > MOST_BYTES:
            raise ConfigError(f"{key}={called(url)} has {size:,} bytes, and {MOST_BYTES:,} are read at most")
        return storage.get(name)
    except NotFound:
        raise ConfigError(f"{key}={url}: there is no such file") from None


def picture_size(key: str, url: str, data: bytes) -> tuple[int, int]:
    """Width and height of a picture by its header. Raises ConfigError as read_rgb does, but for damaged pixels."""
    with _opened(key, url, data) as picture:
        return picture.size


def read_rgb(key: str, url: str, data: bytes) -> np.ndarray:
    """The upright picture, (H, W, 3) uint8 RGB, transparency over white, as `encode` reads pictures.

    Raises ConfigError for what is no whole PNG, JPEG or WebP, has more than MOST_PIXELS or more than 8 bits a channel.
    """
    with _opened(key, url, data) as picture:
        if picture.mode not in EIGHT_BITS or (data.startswith(PNG_START) and data[24:25] == b"\x10"):
            raise ConfigError(f"{key}={called(url)} has more than 8 bits a channel: save it with 8")
        try:
            upright = ImageOps.exif_transpose(picture)
            if upright.has_transparency_data:
                upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright.convert("RGBA"))
            return np.array(upright.convert("RGB"))
        except Exception as error:  # whatever Pillow makes of damaged pixels
            raise _damaged(key, url, error) from None


@contextmanager
def _opened(key: str, url: str, data: bytes) -> Iterator[Image.Image]:
    """The picture with its header read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            picture = Image.open(io.BytesIO(data), formats=FORMATS)
        except Image.DecompressionBombError:
            raise ConfigError(f"{key}={called(url)} has more than {MOST_PIXELS:,} pixels") from None
        except Exception as error:  # Pillow raises errors of many kinds
            raise _damaged(key, url, error) from None
        with picture:
            width, height = picture.size
            if width * height > MOST_PIXELS:
                raise ConfigError(
                    f"{key}={called(url)} has {width:,} x {height:,} pixels, and {MOST_PIXELS:,} are read at most"
                )
            if picture.format == "JPEG" and data.count(b"\xff\xda") > MOST_SCANS:
                raise ConfigError(f"{key}={called(url)} is a JPEG of more than {MOST_SCANS} scans: save it anew")
            if picture.format == "PNG" and not _is_whole(data):
                raise ConfigError(f"{key}={called(url)} is cut or damaged")
            yield picture


def _is_whole(data: bytes) -> bool:
    """Whether a PNG's chunks are all there, with the checksums that they name: Pillow takes one that is cut for a
    picture whose last rows are black."""
    position = len(PNG_START)
    while position + 12 <= len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        end = position + 8 + length
        if zlib.crc32(data[position + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            return False
        if data[position + 4 : position + 8] == b"IEND":
            return True
        position = end + 4
    return False


def _damaged(key: str, url: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"{key}={called(url)} cannot be read as a picture ({one_line(str(error))[:200] or type(error).__name__}): a "
        "whole PNG, JPEG or WebP is wanted"
    )
