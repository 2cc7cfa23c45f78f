"""A crop as a lossless PNG: how it is written, and read strictly again.

Only what `png_bytes` writes is read: 8-bit RGB of the expected size, not interlaced, in the chunks IHDR, IDAT and IEND.
Pillow is imported where a PNG is written or read: other caches need none of it.
"""

from __future__ import annotations

import io
import zlib

import numpy as np

from pipeline.errors import ShardCorrupt

START = b"\x89PNG\r\n\x1a\n"
RGB_8 = bytes([8, 2, 0, 0, 0])
"""Bits of a channel, colour type, compression, filter and interlacing in IHDR."""
LEVEL = 4
"""Of compression: half the time of the usual 6, for less than a hundredth more bytes of photographs."""


def png_bytes(pixels_HWC: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 -> the bytes (N,) uint8 of a PNG. They depend on the pixels and `png_library` alone."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels_HWC)).save(out, "PNG", compress_level=LEVEL)
    return np.frombuffer(out.getvalue(), dtype=np.uint8)


def png_library() -> str:
    """The library that compresses and the level that it is given, on which the bytes depend."""
    from PIL import features

    ng = features.version("zlib_ng")
    library = f"zlib-ng {ng}" if ng else f"zlib {features.version('zlib')}"
    return f"{library}, level {LEVEL}"


def png_size(data: np.ndarray) -> tuple[int, int]:
    """(width, height) that the header (N,) uint8 says."""
    width, height = (int.from_bytes(data[place : place + 4].tobytes(), "big") for place in (16, 20))
    return width, height


def read_png(data: np.ndarray | bytes, size: tuple[int, int], out: np.ndarray | None = None) -> np.ndarray:
    """The bytes (N,) uint8 of a PNG of `size` (width, height) -> pixels (3, H, W) uint8, in `out` if it is given.

    Raises ShardCorrupt for anything that `png_bytes` does not write.
    """
    from PIL import Image

    view = memoryview(data.tobytes() if isinstance(data, np.ndarray) else data)
    _require_plain(view, size)
    try:
        with Image.open(io.BytesIO(view), formats=("PNG",)) as image:
            decoded = np.asarray(image)
    except Exception as error:  # Pillow raises errors of many kinds for damaged bytes
        raise ShardCorrupt(f"its pixels cannot be decoded ({' '.join(str(error).split())[:120]})") from None
    planes = decoded.transpose(2, 0, 1)
    if out is None:
        return np.ascontiguousarray(planes)
    out[...] = planes
    return out


def _require_plain(view: memoryview, size: tuple[int, int]) -> None:
    """Raise ShardCorrupt unless the chunks are IHDR of this size, IDAT and IEND, each with its checksum."""
    place, kinds = len(START), list[bytes]()
    if bytes(view[:place]) != START:
        raise ShardCorrupt("its pixels are no PNG")
    while place < len(view):
        length = int.from_bytes(view[place : place + 4], "big")
        kind, body = bytes(view[place + 4 : place + 8]), view[place + 8 : place + 8 + length]
        checksum = view[place + 8 + length : place + 12 + length]
        if len(checksum) != 4 or zlib.crc32(view[place + 4 : place + 8 + length]) != int.from_bytes(checksum, "big"):
            raise ShardCorrupt("its PNG is cut, or a chunk of it has another checksum")
        if kind == b"IHDR" and bytes(body) != b"".join(side.to_bytes(4, "big") for side in size) + RGB_8:
            raise ShardCorrupt(f"its PNG is not 8-bit RGB of {size[0]} x {size[1]} pixels")
        kinds.append(kind)
        place += 12 + length
    if len(kinds) < 3 or kinds != [b"IHDR", *[b"IDAT"] * (len(kinds) - 2), b"IEND"]:
        raise ShardCorrupt("its PNG has other chunks than IHDR, IDAT and IEND")
