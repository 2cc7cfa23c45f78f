"""Decodes PNGs so that missing rows are found.

Pillow takes a compressed stream that ends early for the end of the picture and leaves the other rows black. Here the
last pixel is painted in MARK before: where the paint is still there, the inflated bytes are counted.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

from PIL import Image, ImageFile

from pipeline.errors import RecordRejected

START = b"\x89PNG\r\n\x1a\n"
MOST_CHUNKS = 200_000
PIECE = 1 << 20  # bytes inflated at a time
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""Adam7: first column, first row, step across and step down of each pass."""
MARK: dict[str, int | tuple[int, ...]] = {
    "1": 255,
    "L": 137,
    "P": 137,
    "I;16": 35_111,
    "LA": (137, 61),
    "RGB": (137, 29, 214),
    "RGBA": (137, 29, 214, 61),
}


def depth(data: bytes) -> int:
    """Bits of a channel, according to the header."""
    return data[24]


def load_png(image: ImageFile.ImageFile, data: bytes) -> None:
    """Decodes an opened PNG, as its `load` does. Raises RecordRejected, image_truncated, where rows are missing, and
    what Pillow raises."""
    mark = MARK.get(image.mode)
    interlaced = bool(image.info.get("interlace"))
    last = (image.width - 1, image.height - 1)
    if mark is not None and not interlaced:
        painted = Image.new(image.mode, image.size, None)
        painted.putpixel(last, mark)
        image.im = painted.im
    image.load()
    if mark is None or interlaced or image.getpixel(last) == mark:
        expected = inflated_size(image.size, depth(data) * CHANNELS[data[25]], interlaced=interlaced)
        found = _inflate(data, expected)
        if found < expected:
            raise RecordRejected("image_truncated", f"it holds {found} of {expected} bytes of pixels")


def inflated_size(size: tuple[int, int], bits: int, *, interlaced: bool) -> int:
    """Bytes of all rows before compression. size: (width, height) in pixels. bits: of a pixel."""
    passes = PASSES if interlaced else ((0, 0, 1, 1),)
    total = 0
    for left, top, across, down in passes:
        width, height = -(-(size[0] - left) // across), -(-(size[1] - top) // down)
        if width > 0 and height > 0:
            total += height * (1 + -(-width * bits // 8))
    return total


def _inflate(data: bytes, most: int) -> int:
    """Number of bytes, up to about `most`, that the chunks of pixels inflate to; 0 where they are damaged."""
    inflater, total = zlib.decompressobj(), 0
    try:
        for chunk in _pixels(data):
            rest = chunk
            while rest and total < most:
                total += len(inflater.decompress(rest, PIECE))
                rest = inflater.unconsumed_tail
            if total >= most or inflater.eof:
                break
    except zlib.error:
        return 0
    return total


def _pixels(data: bytes) -> Iterator[bytes]:
    """The bodies of the IDAT chunks."""
    position = len(START)
    while position + 12 <= len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        if data[position + 4 : position + 8] == b"IDAT":
            yield data[position + 8 : position + 8 + length]
        position += 12 + length


def refuse_chunks(data: bytes) -> None:
    """Raises RecordRejected, image_unreadable, for more than MOST_CHUNKS chunks."""
    if len(data) <= 12 * MOST_CHUNKS:
        return
    position = len(START)
    for _ in range(MOST_CHUNKS):
        if position >= len(data):
            return
        position += 12 + int.from_bytes(data[position : position + 4], "big")
    raise RecordRejected("image_unreadable", f"it has more than {MOST_CHUNKS} chunks")
