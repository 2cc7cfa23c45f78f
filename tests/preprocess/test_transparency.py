"""preprocess/source/rgb.py: every mode becomes RGB, with transparency over white."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from PIL import Image

from made.hostile import Part, chunk, encoded, one_colour
from pipeline.config import LimitsConfig
from pipeline.errors import RecordRejected
from preprocess.source.image import decode_image, open_image
from preprocess.source.rgb import to_rgb

WHITE = [255, 255, 255]


def first_pixel(data: bytes) -> list[int]:
    return np.asarray(decode_image(open_image(data, LimitsConfig()), data))[0, 0].tolist()


@pytest.mark.parametrize(
    ("depth", "value", "shown"),
    [(1, 0, 0), (2, 1, 85), (4, 3, 51), (4, 0, 0), (8, 7, 7), (8, 0, 0), (16, 300, 1), (16, 0, 0), (16, 65_535, 255)],
)
def test_a_transparent_grey_is_white_at_every_depth(depth: int, value: int, shown: int) -> None:
    """F13: of 2, 4 and 16 bits it was not."""
    assert first_pixel(one_colour(depth, 0, value, chunk(b"tRNS", struct.pack(">H", value)))) == WHITE
    other = struct.pack(">H", value + 1 if value == 0 else value - 1)
    if depth > 1:
        assert first_pixel(one_colour(depth, 0, value, chunk(b"tRNS", other))) == [shown] * 3
    assert first_pixel(one_colour(depth, 0, value)) == [shown] * 3


@pytest.mark.parametrize(("depth", "value"), [(8, (1, 2, 3)), (16, (300, 2_000, 40_000))])
def test_a_transparent_colour_is_white_at_every_depth(depth: int, value: Part) -> None:
    assert isinstance(value, tuple)
    shown = [part >> (depth - 8) for part in value]
    assert first_pixel(one_colour(depth, 2, value, chunk(b"tRNS", struct.pack(">HHH", *value)))) == WHITE
    assert first_pixel(one_colour(depth, 2, value, chunk(b"tRNS", struct.pack(">HHH", 9, 9, 9)))) == shown


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_a_transparent_entry_of_a_palette_is_white(depth: int) -> None:
    palette = chunk(b"PLTE", bytes([5, 6, 7, 8, 9, 10]))
    assert first_pixel(one_colour(depth, 3, 1, palette + chunk(b"tRNS", b"\xff\0"))) == WHITE
    assert first_pixel(one_colour(depth, 3, 1, palette + chunk(b"tRNS", b"\xff\x80"))) == [131, 132, 132]
    assert first_pixel(one_colour(depth, 3, 1, palette + chunk(b"tRNS", b"\0"))) == [8, 9, 10]
    assert first_pixel(one_colour(depth, 3, 1, palette)) == [8, 9, 10]


@pytest.mark.parametrize("depth", [8, 16])
def test_an_alpha_channel_lies_over_white(depth: int) -> None:
    assert first_pixel(one_colour(depth, 4, (0, 0))) == WHITE
    assert first_pixel(one_colour(depth, 6, (0, 0, 0, 0))) == WHITE
    most = (1 << depth) - 1
    assert first_pixel(one_colour(depth, 4, (0, most))) == [0, 0, 0]
    clear = Image.new("RGBA", (8, 8), (9, 9, 9, 0))
    assert first_pixel(encoded(clear, "WEBP", lossless=True, exact=True)) == WHITE


def test_modes_that_only_pillow_makes_lie_over_white() -> None:
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    palette = Image.new("PA", (4, 4), (0, 0))
    palette.putpalette([9, 9, 9])
    for image in (clear.convert("LA").convert("La"), clear.convert("RGBa"), palette):
        assert np.asarray(to_rgb(image, 8))[0, 0].tolist() == WHITE, image.mode


@pytest.mark.parametrize("palette", [b"", chunk(b"PLTE", b""), chunk(b"PLTE", b"\1\2")])
@pytest.mark.parametrize("alpha", [b"", chunk(b"tRNS", b"\0")])
def test_a_palette_without_colours_is_rejected(palette: bytes, alpha: bytes) -> None:
    """H3: it raised AssertionError."""
    with pytest.raises(RecordRejected, match="image_unreadable"):
        first_pixel(one_colour(8, 3, 1, palette + alpha))
