"""Builds damaged and hostile pictures and tars, byte by byte."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image

from preprocess.source.png import CHANNELS, PASSES, START

Part = int | tuple[int, ...]


def chunk(kind: bytes, body: bytes) -> bytes:
    """A PNG chunk."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def raw_png(
    size: tuple[int, int],
    rows: bytes,
    depth: int = 8,
    colour: int = 2,
    *,
    interlaced: bool = False,
    before: bytes = b"",
) -> bytes:
    """A PNG of (width, height) that holds `rows`, whatever they are. before: chunks before the pixels."""
    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, interlaced)
    return START + chunk(b"IHDR", header) + before + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def png_rows(size: tuple[int, int], depth: int, colour: int, *, interlaced: bool = False, black: bool = False) -> bytes:
    """The uncompressed rows of a PNG of noise, or of zeros."""
    random, rows = np.random.default_rng(0), b""
    for left, top, across, down in PASSES if interlaced else ((0, 0, 1, 1),):
        width, height = -(-(size[0] - left) // across), -(-(size[1] - top) // down)
        for _ in range(height if width > 0 else 0):
            length = -(-width * depth * CHANNELS[colour] // 8)
            rows += b"\0" + (bytes(length) if black else random.integers(0, 256, length, dtype=np.uint8).tobytes())
    return rows


def one_colour(depth: int, colour: int, value: Part, before: bytes = b"") -> bytes:
    """A PNG of 16 x 4 pixels of one value."""
    parts = value if isinstance(value, tuple) else (value,)
    bits = "".join(f"{part:0{depth}b}" for part in parts) * 16
    row = int(bits, 2).to_bytes(len(bits) // 8, "big")
    return raw_png((16, 4), (b"\0" + row) * 4, depth, colour, before=before)


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture with structure and grain."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray((smooth + random.integers(-8, 9, smooth.shape)).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    """The bytes of a picture's file."""
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()
