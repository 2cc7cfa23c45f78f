"""Label maps: looked at as encode does, and numbered anew where their values have names."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from pipeline.conditions.facts import MOST_LABELS
from pipeline.conditions.labels import label_map
from pipeline.errors import RecordRejected
from preprocess.source import png

LEVEL = 6
"""Of compression; label maps are small."""


def open_map(data: bytes, pixels: int) -> Image.Image:
    """A PNG of which only the header was read. pixels: most that it may have. Raises RecordRejected,
    labels_unreadable."""
    try:
        png.refuse_chunks(data)
        opened = Image.open(io.BytesIO(data), formats=("PNG",))
    except MemoryError:
        raise
    except Exception as error:
        raise RecordRejected("labels_unreadable", str(error)) from None
    if opened.width * opened.height > pixels:
        raise RecordRejected("labels_unreadable", f"it has {opened.width} x {opened.height} pixels")
    return opened


def checked_map(data: bytes, opened: Image.Image, values: np.ndarray | None, offset: int) -> tuple[bytes, int]:
    """The PNG that a shard holds, and its largest label.

    data, opened: of the file. values: (256,) int16, the label of each value after `offset` was added modulo 256, -1
    where it has none; None = the file is copied. Raises RecordRejected: labels_unreadable for damaged files, 16 bits
    and colours; label_unknown for a value without a name.
    """
    try:
        png.load_png(opened, data)  # type: ignore[arg-type]
    except MemoryError:
        raise
    except Exception as error:
        raise RecordRejected("labels_unreadable", str(error)) from None
    found = label_map(opened, 0, MOST_LABELS, png.depth(data))
    if values is None:
        return data, int(found.max())
    shifted = found + np.uint8(offset)
    labels = values[shifted]
    if (labels < 0).any():
        value = int(found[labels < 0][0])
        added = f", and with label_offset {offset} {(value + offset) % 256}" if offset else ""
        raise RecordRejected("label_unknown", f"a pixel is {value}{added}, which has no name")
    out = io.BytesIO()
    Image.fromarray(labels.astype(np.uint8)).save(out, "PNG", compress_level=LEVEL)
    return out.getvalue(), int(labels.max())
