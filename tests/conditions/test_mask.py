"""Holes: drawn alike everywhere, one polarity, packed and pooled without loss of meaning."""

from __future__ import annotations

import hashlib
import io
import math
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.conditions.facts import Kind, MaskFacts
from pipeline.conditions.mask import (
    draw_mask,
    flip,
    hide,
    mask_map,
    mask_of_file,
    masks,
    pack,
    pool,
    unpack,
)
from pipeline.conditions.strokes import _root, paint
from pipeline.errors import ConfigError, RecordRejected

STROKES: tuple[Kind, ...] = ("thin", "medium", "thick")
ALL: tuple[Kind, ...] = (*STROKES, "rectangles")
bits = st.integers(1, 5).flatmap(
    lambda height: st.integers(1, 20).flatmap(
        lambda width: st.lists(st.integers(0, 1), min_size=height * width, max_size=height * width).map(
            lambda values: np.array(values, dtype=np.uint8).reshape(height, width)
        )
    )
)


def png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


# --------------------------------------------------------------------------------------------------------------------
# Drawing

line = st.tuples(*[st.integers(0, 23)] * 4, st.integers(1, 15))


@given(st.lists(line, min_size=1, max_size=4), st.integers(24, 30), st.integers(24, 30))
def test_lines_cover_the_pixels_within_half_their_width(
    lines: list[tuple[int, int, int, int, int]], width: int, height: int
) -> None:
    painted = paint(np.array(lines, dtype=np.int64), (width, height))
    y, x = np.mgrid[:height, :width]
    wanted = np.zeros((height, width), bool)
    for x0, y0, x1, y1, thick in lines:
        dx, dy = x1 - x0, y1 - y0
        length, along = dx * dx + dy * dy, (x - x0) * dx + (y - y0) * dy
        first, last = (x - x0) ** 2 + (y - y0) ** 2, (x - x1) ** 2 + (y - y1) ** 2
        beside = (dx * (y - y0) - dy * (x - x0)) ** 2
        wanted |= (4 * np.minimum(first, last) <= thick**2) | (
            (along >= 0) & (along <= length) & (length > 0) & (4 * beside <= thick**2 * length)
        )
    assert painted.dtype == np.uint8
    assert (painted == wanted).all()


@given(st.integers(0, 2**30), st.integers(-1, 1))
def test_square_roots_are_whole_and_exact(root: int, beside: int) -> None:
    """Also where float64 cannot hold the square."""
    square = max(root * root + beside, 0)
    assert _root(np.array([square]))[0] == math.isqrt(square)


@pytest.mark.parametrize("kind", ALL)
def test_holes_hide_something_and_at_most_half_of_strokes(kind: Kind) -> None:
    shares = [draw_mask(kind, f"k{number}", (96, 64)).mean() for number in range(40)]
    assert min(shares) > 0
    assert max(shares) <= (0.5 if kind in STROKES else 0.5625)
    assert 0.1 < np.mean(shares) < 0.4


def test_a_brush_is_as_wide_as_its_kind_says() -> None:
    """Of thin holes little is left 8 pixels inside, of thick ones much: brushes of 5 to 14 and to 104 pixels at 256."""
    left = {}
    for kind in STROKES:
        holes = [draw_mask(kind, f"k{number}", (256, 256)) for number in range(6)]
        inside = [np.lib.stride_tricks.sliding_window_view(hole, (17, 17)).min(axis=(2, 3)) for hole in holes]
        left[kind] = sum(one.sum() for one in inside) / sum(hole.sum() for hole in holes)
    assert left["thin"] < 0.1 < left["medium"] < left["thick"]
    assert left["thick"] > 0.4


@pytest.mark.parametrize("kind", STROKES)
def test_strokes_scale_with_the_crop(kind: Kind) -> None:
    """The same draws at half the size give the same picture at half the size."""
    overlaps = []
    for number in range(10):
        large, small = (draw_mask(kind, f"k{number}", (side, side)) for side in (256, 128))
        halved = large.reshape(128, 2, 128, 2).mean(axis=(1, 3)) >= 0.5
        overlaps.append((halved & (small > 0)).sum() / (halved | (small > 0)).sum())
    assert np.mean(overlaps) > (0.7 if kind == "thin" else 0.85)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (8, 3), (700, 520)])
def test_every_size_has_holes_of_every_kind(size: tuple[int, int]) -> None:
    for kind in ALL:
        mask = draw_mask(kind, "key", size)
        assert mask.shape == size[::-1]
        assert mask.dtype == np.uint8
        assert set(np.unique(mask)) <= {0, 1}


@given(st.text(st.characters(exclude_categories=["Cs"])), st.integers(4, 64), st.integers(4, 64))
def test_the_first_rectangle_is_that_of_caches_without_variants(key: str, width: int, height: int) -> None:
    words = np.frombuffer(hashlib.sha256(f"mask {key}".encode()).digest(), "<u4").astype(int)
    across, down = (
        side // 4 + word % (side * 3 // 4 - side // 4 + 1) for side, word in ((width, words[0]), (height, words[2]))
    )
    left, top = words[1] % (width - across + 1), words[3] % (height - down + 1)
    wanted = np.zeros((height, width), np.uint8)
    wanted[top : top + down, left : left + across] = 1
    assert (draw_mask("rectangles", key, (width, height)) == wanted).all()
    assert (masks(key, (width, height), MaskFacts(kinds=("rectangles",))) == wanted).all()


def test_variants_differ_and_the_same_key_gives_the_same_holes() -> None:
    for kind in ALL:
        facts = MaskFacts(kinds=(kind,), variants=4)
        drawn = masks("key", (64, 48), facts)
        assert drawn.shape == (4, 48, 64)
        assert all((one != other).any() for one, other in combinations(drawn, 2))
        assert (drawn == masks("key", (64, 48), facts)).all()
        assert (drawn != masks("other", (64, 48), facts)).any()
        assert (drawn[0] == masks("key", (64, 48), MaskFacts(kinds=(kind,)))).all(), "more variants, the same first"


def test_kinds_have_equal_chances() -> None:
    facts = MaskFacts(kinds=("thin", "rectangles", "file"), variants=64)
    given_mask = np.eye(16, dtype=np.uint8)
    drawn = np.concatenate([masks(f"k{number}", (16, 16), facts, given_mask) for number in range(10)])
    of_file = (drawn == given_mask).all(axis=(1, 2)).sum()
    assert abs(of_file - 640 / 3) < 5 * 12
    rectangles = sum(int(one.sum() == one.any(axis=0).sum() * one.any(axis=1).sum()) for one in drawn)
    assert abs(rectangles - 640 / 3) < 5 * 12 + 10


def test_everything_is_hidden_in_a_quarter_of_the_holes_where_all_is_one_of_four_kinds() -> None:
    """As in the training of Stable Diffusion's inpainting models."""
    facts = MaskFacts(kinds=("thin", "medium", "thick", "all"), variants=64)
    drawn = np.concatenate([masks(f"k{number}", (16, 24), facts) for number in range(10)])
    assert drawn.shape == (640, 24, 16)
    assert abs(drawn.all(axis=(1, 2)).sum() - 160) < 5 * 11
    assert (masks("k", (16, 24), MaskFacts(kinds=("all",))) == 1).all()
    assert pool(drawn[:1] | 1, 8, "max").tolist() == pool(drawn[:1] | 1, 8, "nearest").tolist() == [[[1] * 2] * 3]


def test_a_kind_of_file_needs_a_file() -> None:
    with pytest.raises(RecordRejected, match="mask_missing"):
        masks("k", (4, 4), MaskFacts(kinds=("file",)))
    given_mask = np.eye(4, dtype=np.uint8)
    assert (masks("k", (4, 4), MaskFacts(kinds=("file",)), given_mask) == given_mask).all()


@pytest.mark.parametrize(
    ("kind", "digests"),
    [
        ("thin", ("27103cd0097e", "3cba8d9ccdeb", "ca9620c5e8d8")),
        ("medium", ("da645004b766", "0ec90b1d9c16", "b6f54295cbf8")),
        ("thick", ("cb6626620212", "89b914c1b873", "978a20d983c3")),
        ("rectangles", ("2828672e38cd", "7e47f0476c84", "6fe6f5f91e3a")),
    ],
)
def test_holes_are_those_of_stored_caches(kind: Kind, digests: tuple[str, str, str]) -> None:
    """Whatever machine drew them."""
    drawn = (
        draw_mask(kind, "a key", (256, 256)),
        draw_mask(kind, "b", (96, 64), 3),
        draw_mask(kind, "c", (512, 768), 1),
    )
    assert tuple(hashlib.sha256(pack(one).tobytes()).hexdigest()[:12] for one in drawn) == digests


# --------------------------------------------------------------------------------------------------------------------
# Packing, pooling and hiding


@given(bits)
def test_packing_keeps_every_pixel(mask: np.ndarray) -> None:
    packed = pack(mask)
    assert packed.shape == (mask.shape[0], -(-mask.shape[1] // 8))
    assert (unpack(packed, mask.shape[1]) == mask).all()
    assert packed[0, 0] >> 7 == mask[0, 0], "the first pixel is the highest bit"
    several = np.stack([mask, 1 - mask])
    assert (unpack(pack(several), mask.shape[1]) == several).all()


@given(bits)
def test_flipping_commutes_with_packing_and_pooling(mask: np.ndarray) -> None:
    width = mask.shape[1]
    assert (unpack(pack(flip(mask)), width) == flip(unpack(pack(mask), width))).all()
    large = np.kron(mask, np.ones((3, 3), np.uint8))
    assert (pool(flip(large), 3, "max") == flip(pool(large, 3, "max"))).all()
    assert (flip(flip(mask)) == mask).all()


@given(st.integers(0, 2**63), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5))
def test_pooling_is_the_maximum_or_the_first_pixel_of_each_cell(
    seed: int, rows: int, columns: int, factor: int
) -> None:
    mask = (np.random.default_rng(seed).random((rows * factor, columns * factor)) < 0.2).astype(np.uint8)
    largest, first = pool(mask, factor, "max"), pool(mask, factor, "nearest")
    for row in range(rows):
        for column in range(columns):
            cell = mask[row * factor : (row + 1) * factor, column * factor : (column + 1) * factor]
            assert largest[row, column] == cell.max()
            assert first[row, column] == cell[0, 0]
    several = np.stack([mask, 1 - mask])
    assert (pool(several, factor, "max")[1] == pool(1 - mask, factor, "max")).all()


def test_nearest_pooling_is_that_of_diffusers() -> None:
    """Its inpainting resizes the mask by torch's interpolate, of which nearest is the default."""
    mask = (np.random.default_rng(0).random((64, 96)) < 0.5).astype(np.uint8)
    resized = torch.nn.functional.interpolate(torch.from_numpy(mask)[None, None].float(), size=(8, 12))
    assert (pool(mask, 8, "nearest") == resized[0, 0].numpy()).all()


def test_a_rim_that_nearest_misses_is_hidden_by_max() -> None:
    """A cell with one hidden pixel must not count as known."""
    mask = np.zeros((16, 16), np.uint8)
    mask[7, 7] = 1
    assert pool(mask, 8, "nearest").sum() == 0
    assert pool(mask, 8, "max").tolist() == [[1, 0], [0, 0]]


def test_the_hole_is_exactly_grey_or_exactly_black_and_the_rest_is_as_it_was() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3)).astype(np.uint8)
    mask = np.zeros((6, 8), np.uint8)
    mask[2:4, 3:] = 1
    unit = torch.from_numpy(pixels).float().div(127.5).sub(1).numpy()
    for colour, value in (("grey", 0.0), ("black", -1.0)):
        hidden = hide(pixels, mask, colour)  # type: ignore[arg-type]
        assert hidden.dtype == np.float32
        assert (hidden[mask == 1] == value).all()
        assert (hidden[mask == 0] == unit[mask == 0]).all(), "as encode turns pixels into the autoencoder's range"
    published = (1 - mask[..., None]) * (pixels / 255) * 2 - 1
    assert np.abs(hide(pixels, mask, "black") - published).max() < 1e-6, "Rombach et al. hide in the range of 0 to 1"


# --------------------------------------------------------------------------------------------------------------------
# Files


def test_white_is_the_hole_in_every_8_bit_mode() -> None:
    grey = np.array([[0, 127, 128, 255]], np.uint8)
    image = Image.fromarray(grey)
    for one in (image, image.convert("RGB"), image.convert("P")):
        assert mask_map(one).tolist() == [[0, 0, 1, 1]]
        assert mask_of_file(png(one)).tolist() == [[0, 0, 1, 1]]
    assert mask_of_file(png(image.point(lambda value: 255 * (value > 127)).convert("1"))).tolist() == [[0, 0, 1, 1]]


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (Image.new("RGBA", (2, 2)), "transparency"),
        (Image.new("LA", (2, 2)), "transparency"),
        (Image.fromarray(np.full((2, 2), 65535, np.uint16)), "mode I;16"),
    ],
)
def test_a_mask_without_a_polarity_is_refused(image: Image.Image, words: str) -> None:
    with pytest.raises(RecordRejected, match=words) as rejection:
        mask_map(image)
    assert rejection.value.reason == "mask_unreadable"
    with pytest.raises(ConfigError, match="white is the hole"):
        mask_of_file(png(image), "mask.png")


@pytest.mark.parametrize("data", [b"", b"\xff\xd8\xff", png(Image.new("L", (64, 64), 9))[:-30], b"\x89PNG\r\n\x1a\n"])
def test_a_file_that_is_no_mask_is_refused_in_one_line(data: bytes) -> None:
    with pytest.raises(ConfigError, match=r"mask\.png: it cannot be read") as error:
        mask_of_file(data, "mask.png")
    assert "\n" not in str(error.value)
