"""Small images: 8 bits, of the right size, and the same on every machine."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from pipeline.conditions import bsr
from pipeline.conditions.draws import Draws
from pipeline.conditions.facts import LowresFacts
from pipeline.conditions.lowres import bicubic, crop_small, enlarge, flip, lowres
from pipeline.conditions.resampling import Kernel, gaussian, mirrored, resize, symmetric
from pipeline.errors import RecordRejected

BOX, BICUBIC, BSR, FILE = (
    LowresFacts(factor=4, degradation=degradation)  # type: ignore[arg-type]
    for degradation in ("box", "bicubic", "bsr", "file")
)


@dataclass(frozen=True)
class Place:
    resized: tuple[int, int]
    box: tuple[int, int, int, int]


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def scene(side: int = 64) -> np.ndarray:
    """A picture with edges and slopes, made of whole numbers."""
    y, x = np.mgrid[:side, :side]
    disc = (x - side // 3) ** 2 + (y - side // 2) ** 2 < (side // 4) ** 2
    return np.stack([np.where(disc, 230, x * 255 // side), y * 255 // side, np.where(x > y, 40, 200)], -1).astype(
        np.uint8
    )


@given(st.integers(2, 5), st.integers(1, 4), st.integers(1, 4), st.integers(0, 4), st.integers(0, 4))
def test_box_is_the_mean_of_blocks_rounded_half_up(
    factor: int, rows: int, columns: int, below: int, right: int
) -> None:
    """What is left over at the bottom and the right is not seen."""
    pixels = noise(rows * factor + below % factor, columns * factor + right % factor, rows)
    small = lowres(pixels, LowresFacts(factor=factor, degradation="box"), "k")
    assert small.shape == (3, rows, columns)
    assert small.dtype == np.uint8
    for row in range(rows):
        for column in range(columns):
            block = pixels[row * factor : (row + 1) * factor, column * factor : (column + 1) * factor].astype(int)
            wanted = [math.floor(block[..., channel].sum() / factor**2 + 0.5) for channel in range(3)]
            assert small[:, row, column].tolist() == wanted


def test_bicubic_is_antialiased_and_clipped_to_8_bits() -> None:
    """An edge from black to white overshoots; wrapped or kept in floats it would tell more than 8 bits do."""
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:, 32:] = 255
    small = lowres(pixels, BICUBIC, "k")
    assert small.dtype == np.uint8
    assert small.shape == (3, 8, 16)
    assert (small[:, :, :7] == 0).all()
    assert (small[:, :, 9:] == 255).all()
    checks = np.indices((64, 64)).sum(axis=0) % 2 * np.uint8(255)
    aliased = lowres(np.repeat(checks[..., None], 3, axis=2).astype(np.uint8), BICUBIC, "k")
    assert np.abs(aliased[:, 1:-1, 1:-1].astype(int) - 128).max() <= 1, "a fine pattern becomes grey"


def test_bicubic_agrees_with_a_second_implementation() -> None:
    pixels = noise(64, 48)
    floats = torch.from_numpy(pixels).permute(2, 0, 1)[None].double()
    wanted = torch.nn.functional.interpolate(floats, size=(16, 12), mode="bicubic", antialias=True)
    assert np.abs(lowres(pixels, BICUBIC, "k") - wanted[0].clamp(0, 255).round().numpy()).max() <= 1


@pytest.mark.parametrize("facts", [BOX, BICUBIC])
def test_flipping_commutes_with_reducing(facts: LowresFacts) -> None:
    pixels = noise(32, 48)
    assert (lowres(np.ascontiguousarray(pixels[:, ::-1]), facts, "k") == flip(lowres(pixels, facts, "k"))).all()


@pytest.mark.parametrize("factor", [2, 4, 8])
@pytest.mark.parametrize("degradation", ["box", "bicubic", "bsr"])
def test_each_degradation_keeps_the_picture_and_gives_k_variants(degradation: str, factor: int) -> None:
    one = LowresFacts(factor=factor, degradation=degradation)  # type: ignore[arg-type]
    several = LowresFacts(factor=factor, degradation=degradation, variants=3)  # type: ignore[arg-type]
    pixels = scene(128)
    small, stack = lowres(pixels, one, "k"), lowres(pixels, several, "k")
    assert small.shape == (3, 128 // factor, 128 // factor)
    assert stack.shape == (3, *small.shape)
    assert stack.dtype == np.uint8
    assert (stack[0] == small).all(), "more variants, the same first"
    assert np.abs(stack.mean(axis=(2, 3)) - pixels.mean(axis=(0, 1))).max() < 2 * factor
    assert ((stack[0] != stack[1]).any() and (stack[1] != stack[2]).any()) == (degradation == "bsr")


def test_the_samples_own_small_image_is_taken_as_it_is_or_refused() -> None:
    pixels, small = scene(), noise(16, 16)
    assert (lowres(pixels, FILE, "k", small) == small.transpose(2, 0, 1)).all()
    with pytest.raises(RecordRejected, match="lowres_missing"):
        lowres(pixels, FILE, "k")
    with pytest.raises(RecordRejected, match="lowres_size: 8 x 16, 16 x 16 are wanted"):
        lowres(pixels, FILE, "k", small[:, :8])


def test_a_crop_of_a_small_file_has_its_own_pixels_where_nothing_was_resized() -> None:
    small = noise(20, 30)
    image = Image.fromarray(small)
    crop = Place((120, 80), (16, 8, 64, 32))
    assert (crop_small(image, crop, (120, 80), 4) == small[2:10, 4:20]).all()
    assert (crop_small(image, crop, (123, 83), 4) == crop_small(image, crop, (120, 80), 4)).all(), "rounded down"
    half = Place((60, 40), (8, 4, 32, 16))
    assert crop_small(image, half, (120, 80), 4).shape == (4, 8, 3)
    with pytest.raises(RecordRejected, match="lowres_size: 30 x 20 beside an image of 60 x 40 at factor 4"):
        crop_small(image, crop, (60, 40), 4)


def test_enlarging_is_the_baseline_that_a_model_must_beat() -> None:
    pixels = scene()
    large = enlarge(lowres(pixels, BICUBIC, "k"), (64, 64))
    assert large.shape == (64, 64, 3)
    assert large.dtype == np.uint8
    wanted = np.asarray(Image.fromarray(bicubic(pixels, 4)).resize((64, 64), Image.Resampling.BICUBIC))
    assert (large == wanted).all()
    error = np.mean((large.astype(float) - pixels) ** 2)
    assert 20 < 10 * math.log10(255**2 / error) < 35


# --------------------------------------------------------------------------------------------------------------------
# LDM-BSR


def test_degradations_are_those_of_stored_caches() -> None:
    """Whatever machine made them."""
    made = {key: lowres(scene(), BSR, key) for key in ("a", "b", "c", "d")}
    digests = {key: hashlib.sha256(small.tobytes()).hexdigest()[:12] for key, small in made.items()}
    assert digests == {"a": "721968358501", "b": "25b18fcc56e4", "c": "6c515cd64cdf", "d": "6ffebb823073"}
    assert len({small.tobytes() for small in made.values()}) == 4


def test_degradations_are_worse_than_bicubic_and_not_ruins() -> None:
    reference = bicubic(scene(), 4).astype(float)
    errors = [np.mean((bsr.degrade(scene(), 4, f"k{number}", 0) - reference) ** 2) for number in range(40)]
    decibels = np.array([10 * math.log10(255**2 / error) for error in errors])
    assert decibels.max() < 40
    assert decibels.min() > 15
    assert decibels.std() > 0.5, "strengths are drawn"


def test_small_crops_and_other_factors_are_degraded_too() -> None:
    for side, factor in ((4, 4), (8, 4), (6, 3), (16, 8), (2, 2)):
        for number in range(12):
            small = bsr.degrade(noise(side, 2 * side), factor, f"k{number}", 0)
            assert small.shape == (side // factor, 2 * side // factor, 3)


@pytest.mark.parametrize(("side", "even"), [((5, 5), False), ((7, 7), False), ((6, 6), True), ((14, 14), True)])
def test_the_blur_is_scipys_with_a_mirrored_border(side: tuple[int, int], even: bool) -> None:
    image = (noise(20, 17) / np.float32(255)).astype(np.float32)
    places = np.arange(side[0]) - (side[0] - 1) / 2
    x, y = 0.8 * places[None] + 0.6 * places[:, None], 0.8 * places[:, None] - 0.6 * places[None]
    weights = np.exp(-0.5 * (x**2 / 1.7 + y**2 / 0.6))
    wanted = ndimage.convolve(image.astype(float), (weights / weights.sum())[:, :, None], mode="mirror")
    assert np.abs(bsr.convolve(image, weights) - wanted).max() < 2e-4, "weights below 2**-12 are left out"
    assert (places[0] % 1 == 0.5) == even


@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        ("linear", {"mode": "bilinear"}),
        ("cubic", {"mode": "bicubic"}),
        ("antialiased", {"mode": "bicubic", "antialias": True}),
    ],
)
@pytest.mark.parametrize("size", [(13, 20), (26, 18), (70, 50)])
def test_resizing_agrees_with_a_second_implementation(
    kernel: Kernel, options: dict[str, object], size: tuple[int, int]
) -> None:
    image = (noise(52, 37) / np.float32(255)).astype(np.float32)
    floats = torch.from_numpy(image).permute(2, 0, 1)[None].double()
    wanted = torch.nn.functional.interpolate(floats, size=size, align_corners=False, **options)  # type: ignore[arg-type]
    inner = (slice(3, -3), slice(3, -3)) if kernel == "antialiased" else (slice(None), slice(None))
    assert np.abs(resize(image, size, kernel) - wanted[0].permute(1, 2, 0).numpy())[inner].max() < 1e-6


def test_area_resizing_keeps_the_mean_and_covers_every_pixel_alike() -> None:
    image = (noise(50, 37) / np.float32(255)).astype(np.float32)
    for size in ((10, 37), (13, 11), (49, 36)):
        small = resize(image, size, "area")
        assert np.abs(small.mean(axis=(0, 1)) - image.mean(axis=(0, 1))).max() < 1e-6
    assert np.abs(resize(image, (10, 37), "area") - image.reshape(10, 5, 37, 3).mean(axis=1)).max() < 1e-6


@given(st.integers(1, 6), st.integers(-20, 20))
def test_borders_are_mirrored_as_numpy_pads(side: int, place: int) -> None:
    line = np.arange(side)
    assert symmetric(np.array([place]), side)[0] == np.pad(line, 30, mode="symmetric")[30 + place]
    if side > 1:
        assert mirrored(np.array([place]), side)[0] == np.pad(line, 30, mode="reflect")[30 + place]


@given(st.lists(st.floats(0, 75), min_size=1, max_size=20))
def test_the_exponential_of_our_own_is_that_of_libm(exponents: list[float]) -> None:
    x = np.array(exponents)
    assert gaussian(x) == pytest.approx(np.exp(x.min() - x), rel=1e-8)


def test_noise_has_the_drawn_level_and_its_three_kinds() -> None:
    grey = coloured = correlated = 0
    for number in range(150):
        drawn = bsr._noise((40, 40), Draws("noise", str(number))) * 255
        assert drawn.dtype == np.float32
        if drawn.shape[2] == 1:
            grey += 1
            assert min(abs(drawn.std() - level) for level in (1, 2)) < 0.15
            continue
        shared = np.corrcoef(drawn.reshape(-1, 3).T)[np.triu_indices(3, 1)]
        if np.abs(shared).max() < 0.12 and min(np.abs(drawn.std(axis=(0, 1)) - level).max() for level in (1, 2)) < 0.2:
            coloured += 1
        else:
            correlated += 1
            assert shared.min() > -0.12, "absolute values of a covariance"
            assert drawn.std() < 2.1
    assert abs(grey - 60) < 5 * 6
    assert abs(coloured - 60) < 5 * 6
    assert abs(correlated - 30) < 5 * 5


def test_the_covariance_of_correlated_noise_is_one() -> None:
    for number in range(50):
        lower = np.array(bsr._root_of_covariance(Draws("covariance", str(number))))
        assert np.isfinite(lower).all()
        assert (np.triu(lower, 1) == 0).all()
        covariance = lower @ lower.T
        assert (covariance >= -1e-12).all()
        assert np.linalg.eigvalsh(covariance).min() > -1e-9
        assert 0 < np.trace(covariance) < 3


def test_the_last_resize_comes_after_the_first_and_jpeg_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []

    def recorded(name: str) -> Callable[..., Any]:
        real = getattr(bsr, name)

        def record(*given: Any) -> Any:
            steps.append(name)
            return real(*given)

        return record

    for name in ("_blur", "_first_resize", "_noise", "_jpeg", "resize"):
        monkeypatch.setattr(bsr, name, recorded(name))
    orders = set()
    for number in range(60):
        steps.clear()
        bsr.degrade(scene(), 8, str(number), 0)
        assert steps[-1] == "_jpeg"
        last = max(place for place, step in enumerate(steps) if step == "resize")
        assert steps.index("_first_resize") < last
        orders.add(tuple(steps))
    assert len(orders) > 15
