"""Label maps: numbers that are never mixed, converted or silently wrapped."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.conditions.facts import LabelFacts
from pipeline.conditions.labels import flip, label_map, labels_of_file, read_label_file, sample_labels
from pipeline.errors import ConfigError, RecordRejected

GREYS = np.arange(256, dtype=np.uint8).reshape(16, 16)


def png(image: Image.Image, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG", **options)
    return out.getvalue()


def reason(image: Image.Image, offset: int = 0, count: int = 256) -> RecordRejected:
    with pytest.raises(RecordRejected) as rejection:
        label_map(image, offset, count)
    return rejection.value


def test_greys_and_the_numbers_of_a_palette_are_labels() -> None:
    palette = Image.fromarray(GREYS).convert("P")
    palette.putpalette(bytes(3 * (255 - number) % 256 for number in range(256) for _ in range(3)))
    for image in (Image.fromarray(GREYS), palette):
        assert (label_map(image, 0, 256) == GREYS).all()


def test_the_offset_wraps_so_that_unlabelled_pixels_become_0() -> None:
    labels = label_map(Image.fromarray(np.array([[0, 181, 255]], np.uint8)), 1, 183)
    assert labels.tolist() == [[1, 182, 0]]
    assert labels.dtype == np.uint8


@given(st.integers(0, 255), st.integers(0, 255), st.integers(1, 256))
def test_labels_are_checked_after_the_offset(value: int, offset: int, count: int) -> None:
    image = Image.fromarray(np.full((2, 3), value, np.uint8))
    label = (value + offset) % 256
    if label < count:
        assert (label_map(image, offset, count) == label).all()
    else:
        rejection = reason(image, offset, count)
        assert rejection.reason == "label_out_of_range"
        assert f"a pixel is {value}" in str(rejection)
        assert f"0 to {count - 1}" in str(rejection)


def test_the_first_label_beyond_the_count_is_refused_and_the_last_within_is_taken() -> None:
    image = Image.fromarray(np.array([[0, 150]], np.uint8))
    assert label_map(image, 0, 151).tolist() == [[0, 150]]
    assert str(reason(image, 0, 150)) == "label_out_of_range: a pixel is 150, the labels are 0 to 149"
    assert "a pixel is 150 and with offset 3 153, the labels are 0 to 152" in str(reason(image, 3, 153))


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (Image.fromarray(np.full((2, 2), 300, np.uint16)), "its pixels are 16-bit grey, not 8-bit grey"),
        (Image.new("I", (2, 2), 3), "16-bit grey"),
        (Image.new("RGB", (2, 2)), "its pixels are colours, not 8-bit grey"),
        (Image.new("RGBA", (2, 2)), "colours"),
        (Image.new("LA", (2, 2)), "mode LA"),
        (Image.new("F", (2, 2)), "mode F"),
    ],
)
def test_16_bits_and_colours_are_refused_with_the_reason_and_not_converted(image: Image.Image, words: str) -> None:
    rejection = reason(image)
    assert rejection.reason == "labels_unreadable"
    assert words in str(rejection)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_greys_of_few_bits_are_the_numbers_of_the_file_and_not_stretched(bits: int) -> None:
    """Pillow opens a 4-bit label 3 as 51."""
    import struct
    import zlib

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    values = [number % 2**bits for number in (1, 0, 3, 2, 1, 1, 0, 3)]
    packed = int("".join(f"{value:0{bits}b}" for value in values), 2).to_bytes(bits, "big")
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 1, bits, 0, 0, 0, 0))
    data += chunk(b"IDAT", zlib.compress(b"\0" + packed)) + chunk(b"IEND", b"")
    assert read_label_file(data, LabelFacts(count=4, grid=1)).tolist() == [values]


# --------------------------------------------------------------------------------------------------------------------
# Cells


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), st.integers(1, 12))
def test_a_cell_has_the_label_at_its_middle(height: int, width: int, rows: int, columns: int) -> None:
    labels = np.arange(height * width, dtype=np.uint8).reshape(height, width)
    cells = sample_labels(labels, (rows, columns))
    for row in range(rows):
        for column in range(columns):
            y, x = int((row + 0.5) * height / rows + 1e-9), int((column + 0.5) * width / columns + 1e-9)
            assert cells[row, column] == labels[y, x]


def test_the_size_of_the_map_gives_the_map_and_no_new_label_appears() -> None:
    labels = np.random.default_rng(0).choice(np.array([3, 200], np.uint8), (37, 41))
    assert (sample_labels(labels, (37, 41)) == labels).all()
    assert set(np.unique(sample_labels(labels, (11, 80)))) <= {3, 200}


@given(st.integers(1, 9), st.integers(1, 9))
def test_flipping_commutes_with_sampling_where_middles_are_pixels(cells: int, odd: int) -> None:
    side = cells * (2 * odd - 1)
    labels = np.random.default_rng(cells).integers(0, 256, (3, side)).astype(np.uint8)
    assert (sample_labels(flip(labels), (3, cells)) == flip(sample_labels(labels, (3, cells)))).all()
    assert (flip(flip(labels)) == labels).all()


def test_a_file_becomes_the_grid_of_a_latent() -> None:
    labels = np.kron(np.arange(16, dtype=np.uint8).reshape(4, 4), np.ones((8, 8), np.uint8))
    facts = LabelFacts(count=17, grid=2, offset=1)
    assert (labels_of_file(png(Image.fromarray(labels)), facts, (2, 2)) == np.arange(1, 17).reshape(4, 4)).all()
    assert labels_of_file(png(Image.fromarray(labels)), facts, (5, 3)).shape == (10, 6)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "it cannot be read as a PNG"),
        (b"GIF89a", "it cannot be read as a PNG"),
        (png(Image.fromarray(GREYS))[:-40], "it cannot be read as a PNG"),
        (png(Image.fromarray(GREYS)), "label_out_of_range: a pixel is 255, the labels are 0 to 4"),
        (png(Image.new("RGB", (4, 4))), "labels_unreadable: its pixels are colours"),
        (png(Image.fromarray(np.full((2, 2), 300, np.uint16))), "16-bit grey"),
        (png(Image.new("1", (9000, 9000))), "9000 x 9000 pixels are too many"),
    ],
)
def test_a_file_that_is_no_label_map_is_refused_in_one_line(data: bytes, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        labels_of_file(data, LabelFacts(count=5, grid=1), (4, 4), "map.png")
    assert str(error.value).startswith("map.png: ")
    assert "\n" not in str(error.value)
