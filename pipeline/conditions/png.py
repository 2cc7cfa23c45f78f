"""PNGs that `latentmill sample` is given: label maps and masks. Encode reads those of shards (preprocess/source/)."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image

from pipeline.errors import ConfigError, RecordRejected
from pipeline.parsing.text import one_line

START = b"\x89PNG\r\n\x1a\n"
WIDTH, HEIGHT, DEPTH = slice(16, 20), slice(20, 24), 24
"""Where the header has the size in pixels and the bits of a channel."""
MOST_PIXELS = 64_000_000


def read_png(data: bytes, where: str, wanted: str, read: Callable[[Image.Image, int], np.ndarray]) -> np.ndarray:
    """What `read` makes of a decoded PNG and its bits per channel.

    where: its name, for messages. wanted: what it should be, in words. Raises ConfigError where it cannot be decoded,
    has more than MOST_PIXELS pixels, or `read` raises RecordRejected.
    """
    try:
        if not data.startswith(START) or len(data) <= DEPTH:
            raise OSError("it does not begin as one")
        width, height = int.from_bytes(data[WIDTH], "big"), int.from_bytes(data[HEIGHT], "big")
        if width * height > MOST_PIXELS:
            raise OSError(f"{width} x {height} pixels are too many, {MOST_PIXELS} are read")
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            image.load()
            return read(image, data[DEPTH])
    except RecordRejected as rejection:
        raise ConfigError(one_line(f"{where}: {rejection} ({wanted} is wanted)")) from None
    except MemoryError:
        raise
    except Exception as error:  # decoders raise whatever they raise
        raise ConfigError(one_line(f"{where}: it cannot be read as a PNG: {error} ({wanted} is wanted)")) from None
