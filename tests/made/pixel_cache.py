"""Makes small sources of pictures, and their caches of pixels, for tests of `encode stored=pixels`."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from made.encode import config, png, write_sized
from pipeline.config.check.verbs import check
from pipeline.data.format.manifest import Manifest, load_manifest
from pipeline.data.format.records import Record
from pipeline.data.reading.shards import first_records
from pipeline.storage.urls import open_storage
from preprocess import encode

SIZES = [(24, 24), (40, 24), (20, 48), (64, 64), (16, 16), (24, 25)]
"""The last but one is smaller than its crop."""
KINDS = ("array", "png")


def make_source(folder: Path) -> str:
    """Writes two shards of pictures with captions. Returns their pattern."""
    (folder / "in").mkdir()
    write_sized(folder / "in" / "0.tar", SIZES[:3])
    write_sized(folder / "in" / "1.tar", SIZES[3:], 3)
    return str(folder / "in" / "*.tar")


def make_pixels(source: str, dest: Path, pixels: str = "array", **changes: Any) -> Manifest:
    """Encodes crops of 24 pixels."""
    settings = config(source, dest, **{"stored": "pixels", "pixels": pixels, "resolution": (24,), **changes})
    check(settings)
    assert encode.main(settings) == 0
    return load_manifest(open_storage(str(dest)))


def records(dest: Path) -> list[Record]:
    """The records of a cache, with their pixels as arrays."""
    storage = open_storage(str(dest))
    return list(first_records(storage, load_manifest(storage), 99))


def crop(number: int, side: int = 24) -> np.ndarray:
    """The crop (H, W, 3) uint8 of a picture, by Pillow alone."""
    image: Image.Image = Image.open(io.BytesIO(png(SIZES[number], number)))
    scale = max(side / image.width, side / image.height)
    resized = (max(side, round(image.width * scale)), max(side, round(image.height * scale)))
    image = image if image.size == resized else image.resize(resized, Image.Resampling.LANCZOS)
    left, top = (resized[0] - side) // 2, (resized[1] - side) // 2
    return np.asarray(image.crop((left, top, left + side, top + side)))
