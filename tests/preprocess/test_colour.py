"""Colour profiles: what they say of pixels is applied, and what is wrong with them harms nothing."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from made.encode import config, files, write_tar
from made.hostile import encoded as file_of
from made.profiles import (
    ADOBE,
    CORNERS,
    P3,
    cmyk_profile,
    encoded,
    grey_profile,
    lifted,
    meant,
    meant_inks,
    profile,
    rgb_profile,
    srgb_profile,
)
from pipeline.config import LimitsConfig, VerifyConfig
from pipeline.config.conditions import LowresConfig
from pipeline.data.format.manifest import load_manifest
from pipeline.data.reading.shards import first_records
from pipeline.errors import DestinationExists
from pipeline.storage.urls import open_storage
from preprocess import verify
from preprocess.colour.profiles import MOST_BYTES, Outcome, _conversion
from preprocess.encode import main
from preprocess.source.image import decode_colours, open_image


def decoded(data: bytes, colour: str = "srgb") -> tuple[np.ndarray, Outcome]:
    image, outcome = decode_colours(open_image(data, LimitsConfig()), data, colour)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int), outcome


def colours(count: int = 64) -> np.ndarray:
    """(8, count / 8, 3) uint8: noise with black and white."""
    noise = np.random.default_rng(0).integers(0, 256, (count, 3), dtype=np.uint8)
    noise[0], noise[1] = 0, 255
    return noise.reshape(8, -1, 3)


# --------------------------------------------------------------------------------------------------------------------
# What profiles say


@pytest.mark.parametrize(("form", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
@pytest.mark.parametrize(("matrix", "gamma"), [(ADOBE, 2.2), (P3, 1.8)], ids=["adobe", "p3"])
def test_a_picture_in_another_space_becomes_srgb(
    form: str, options: dict[str, object], matrix: np.ndarray, gamma: float
) -> None:
    picture = Image.fromarray(colours())
    data = file_of(picture, form, icc_profile=rgb_profile(matrix, gamma), **options)
    pixels, outcome = decoded(data)
    wanted = meant(colours().reshape(-1, 3), matrix, gamma).reshape(pixels.shape)
    assert outcome == "applied"
    assert np.abs(pixels - wanted).max() <= 2
    assert np.abs(pixels - colours()).max() > 20
    untouched, none = decoded(data, "as_stored")
    assert none == "" and (untouched == colours()).all()


def test_a_jpeg_with_a_profile_in_several_segments_becomes_srgb() -> None:
    long = rgb_profile() + bytes(100_000)
    data = file_of(Image.new("RGB", (16, 16), (40, 200, 90)), "JPEG", quality=95, icc_profile=long)
    pixels, outcome = decoded(data)
    assert outcome == "applied"
    assert np.abs(pixels[8, 8] - meant(decoded(data, "as_stored")[0][8, 8][None])[0]).max() <= 2


def test_greys_of_8_and_16_bits_follow_a_grey_profile_and_one_of_colours() -> None:
    greys = np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)
    wanted = encoded(greys / 255.0)[..., None]  # a curve of 1: values are amounts of light
    for picture in (Image.fromarray(greys), Image.fromarray(greys.astype(np.uint16) * 256 + 77)):
        pixels, outcome = decoded(file_of(picture, "PNG", icc_profile=grey_profile(1.0)))
        assert outcome == "applied" and np.abs(pixels - wanted).max() <= 2
    pixels, outcome = decoded(file_of(Image.fromarray(greys), "PNG", icc_profile=rgb_profile(ADOBE, 1.0)))
    assert outcome == "applied" and np.abs(pixels - wanted).max() <= 2


def test_inks_become_the_colours_of_their_press() -> None:
    for inks, colour in CORNERS.items():
        data = file_of(Image.new("CMYK", (16, 16), inks), "JPEG", quality=100, icc_profile=cmyk_profile())
        pixels, outcome = decoded(data)
        assert outcome == "applied"
        assert np.abs(pixels[8, 8] - meant_inks(*colour)).max() <= 6, inks
        assert pixels[8, 8].min() >= 245 if not any(inks) else pixels[8, 8].min() < 200
    assert np.abs(decoded(data, "as_stored")[0][8, 8]).max() <= 2  # Pillow's own: black ink is black


@pytest.mark.parametrize("black", [0.01, 0.05])
def test_the_darkest_of_a_device_becomes_black_and_what_is_above_it_follows(black: float) -> None:
    """Black point compensation: the light that a device gives for 0 is no part of its colours, so that a curve with it
    gives what the same curve gives without."""
    own = rgb_profile(ADOBE, lifted(black, 2.0))
    pixels, outcome = decoded(file_of(Image.fromarray(colours()), "PNG", icc_profile=own))
    assert outcome == "applied" and pixels[0, 0].max() <= 1 and pixels[0, 1].min() >= 254
    off = np.abs(pixels - meant(colours().reshape(-1, 3), ADOBE, 2.0).reshape(pixels.shape))
    assert off.max() <= 6 and off.mean() <= 0.3
    greys = np.arange(256, dtype=np.uint8).reshape(16, 16)
    pixels, outcome = decoded(file_of(Image.fromarray(greys), "PNG", icc_profile=grey_profile(lifted(black, 1.0))))
    assert outcome == "applied" and np.abs(pixels - encoded(greys / 255.0)[..., None]).max() <= 2


def test_all_inks_of_a_press_become_black_and_single_inks_follow() -> None:
    black = 25  # L of all inks together
    for inks, colour in {**CORNERS, (255,) * 4: (black, 0, 0)}.items():
        data = file_of(Image.new("CMYK", (16, 16), inks), "JPEG", quality=100, icc_profile=cmyk_profile(black))
        pixels, outcome = decoded(data)
        assert outcome == "applied"
        assert np.abs(pixels[8, 8] - meant_inks(*colour, black)).max() <= 6, inks
    assert pixels[8, 8].max() <= 1 and meant_inks(black, 0, 0).min() >= 20


def test_transparency_lies_over_white_after_colours_are_converted() -> None:
    colour = (40, 200, 90)
    wanted = meant(np.array([colour]))[0]
    half = file_of(Image.new("RGBA", (4, 4), (*colour, 128)), "PNG", icc_profile=rgb_profile())
    assert np.abs(decoded(half)[0][0, 0] - (wanted + 255) / 2).max() <= 2
    clear = file_of(Image.new("RGBA", (4, 4), (*colour, 0)), "PNG", icc_profile=rgb_profile())
    assert decoded(clear)[0][0, 0].tolist() == [255] * 3
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, *colour])
    assert np.abs(decoded(file_of(palette, "PNG", icc_profile=rgb_profile()))[0][0, 0] - wanted).max() <= 2
    grey = file_of(Image.new("LA", (4, 4), (64, 255)), "PNG", icc_profile=grey_profile(1.0))
    assert np.abs(decoded(grey)[0][0, 0] - encoded(np.array(64 / 255.0))).max() <= 2
    keyed = Image.fromarray(np.full((4, 4), 7 * 256, dtype=np.uint16))
    assert decoded(file_of(keyed, "PNG", transparency=7 * 256, icc_profile=grey_profile(1.0)))[0].min() == 255


@pytest.mark.parametrize(
    "own", [ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), srgb_profile()], ids=["lcms", "table"]
)
def test_srgb_in_any_spelling_changes_no_pixel(own: bytes) -> None:
    for picture in (Image.fromarray(colours()), Image.fromarray(colours()[..., 0])):
        bare, same = (decoded(file_of(picture, "PNG", **more)) for more in ({}, {"icc_profile": own}))
        assert (bare[1], same[1]) == ("", "srgb")
        assert (bare[0] == same[0]).all()


# --------------------------------------------------------------------------------------------------------------------
# Bad profiles


def patched(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


BROKEN = {
    "no profile": b"not a profile",
    "cut": rgb_profile()[:200],
    "longer than it is": patched(rgb_profile(), 0, struct.pack(">I", 1 << 30)),
    "no signature": patched(rgb_profile(), 36, b"bcsp"),
    "a link of devices": patched(rgb_profile(), 12, b"link"),
    "an unknown space": patched(rgb_profile(), 16, b"HSV "),
    "a million tags": patched(rgb_profile(), 128, struct.pack(">I", 1_000_000)),
    "tags beyond its end": patched(rgb_profile(), 148, b"\xff" * 8),
    "no curves": profile(b"mntr", b"RGB ", b"XYZ ", {}),
    "for inks": cmyk_profile(),
    "for greys": grey_profile(),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_profile_that_cannot_be_used_changes_no_pixel_and_is_told(name: str) -> None:
    picture = Image.fromarray(colours())
    bare, _ = decoded(file_of(picture, "PNG"))
    pixels, outcome = decoded(file_of(picture, "PNG", icc_profile=BROKEN[name]))
    assert outcome == "unusable" and (pixels == bare).all()


def test_inks_without_a_profile_for_inks_are_what_they_were() -> None:
    picture = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    bare, other = (decoded(file_of(picture, "JPEG", **more)) for more in ({}, {"icc_profile": rgb_profile()}))
    assert other[1] == "unusable" and (bare[0] == other[0]).all()


def test_a_jpeg_that_lacks_a_segment_of_its_profile_is_taken_as_srgb() -> None:
    data = file_of(Image.new("RGB", (16, 16), (40, 200, 90)), "JPEG", icc_profile=rgb_profile() + bytes(100_000))
    at = data.rindex(b"\xff\xe2")
    cut = data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]
    pixels, outcome = decoded(cut)
    assert outcome == "unusable" and (pixels == decoded(cut, "as_stored")[0]).all()


def test_a_profile_beyond_the_limit_is_not_read() -> None:
    picture = Image.new("RGB", (16, 16), (40, 200, 90))
    most, more = (file_of(picture, "WEBP", icc_profile=rgb_profile() + bytes(size)) for size in (1000, MOST_BYTES))
    assert (decoded(most)[1], decoded(more)[1]) == ("applied", "unusable")


def test_random_damage_to_profiles_never_raises_and_never_takes_long() -> None:
    random, started = np.random.default_rng(0), time.process_time()
    for whole in (rgb_profile(), srgb_profile(), cmyk_profile(), grey_profile()):
        mode = {b"RGB ": "RGB", b"CMYK": "CMYK", b"GRAY": "L"}[whole[16:20]]
        for _ in range(60):
            damaged = bytearray(whole)
            for place in random.integers(0, min(len(whole), 400), random.integers(1, 8)):
                damaged[place] = random.integers(0, 256)
            data = file_of(Image.new(mode, (8, 8), 99), "JPEG", icc_profile=bytes(damaged))
            assert decoded(data)[1] in ("applied", "srgb", "unusable")
    assert time.process_time() - started < 20


# --------------------------------------------------------------------------------------------------------------------
# Caches


def shard(path: Path, first: int = 0) -> str:
    """Eight samples: of each four, one without a profile, one in Adobe RGB, one in sRGB, one with a broken one."""
    members = []
    for i in range(first, first + 8):
        own = ({}, {"icc_profile": rgb_profile()}, {"icc_profile": srgb_profile()}, {"icc_profile": b"broken"})[i % 4]
        noise = np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        members += [(f"{i}.png", file_of(Image.fromarray(noise), "PNG", **own)), (f"{i}.txt", f"picture {i}".encode())]
    write_tar(path, members)
    return str(path)


PIXELS: dict[str, Any] = {"stored": "pixels"}


def test_a_new_cache_holds_srgb_counts_profiles_and_verifies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = shard(tmp_path / "0.tar")
    main(config(source, tmp_path / "c", **PIXELS))
    storage = open_storage(str(tmp_path / "c"))
    manifest = load_manifest(storage)
    assert manifest.contract.colour == "srgb" and manifest.contract.versions["littlecms"]
    assert json.loads(storage.get("units/000000.json"))["profiles"] == {"applied": 2, "srgb": 2, "unusable": 2}
    told = capsys.readouterr().out
    assert "2 converted to sRGB by their colour profiles; 2 with a colour profile that cannot be used" in told
    assert "converted to sRGB" in (tmp_path / "c/card.html").read_text("utf-8")
    records = {record.meta["key"]: record.members["pixels"] for record in first_records(storage, manifest, 99)}
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    wanted = meant(noise.reshape(-1, 3)).reshape(64, 64, 3)
    assert np.abs(records["1"].transpose(1, 2, 0) - wanted).max() <= 2
    assert verify.main(VerifyConfig(dataset=str(tmp_path / "c"), source=source, min_psnr=0.0)) == 0


def test_one_worker_and_three_processes_make_the_same_bytes(tmp_path: Path) -> None:
    source = shard(tmp_path / "0.tar")
    main(config(source, tmp_path / "threads", **PIXELS))
    main(config(source, tmp_path / "processes", decode_in="processes", workers=3, **PIXELS))
    assert files(tmp_path / "threads") == files(tmp_path / "processes")


def test_a_cache_that_was_begun_without_profiles_goes_on_without(tmp_path: Path) -> None:
    """What an earlier version made has colour=as_stored in its contract, and no count of profiles."""
    first, second = shard(tmp_path / "0.tar"), shard(tmp_path / "1.tar", 8)
    main(config(first, tmp_path / "c", colour="as_stored", **PIXELS))
    before = files(tmp_path / "c")
    assert "profiles" not in json.loads(before["units/000000.json"])
    assert "littlecms" not in json.loads(before["manifest.json"])["contract"]["versions"]
    main(config(first, tmp_path / "c", **PIXELS))
    assert files(tmp_path / "c") == before
    main(config(second, tmp_path / "c", **PIXELS))
    manifest = load_manifest(open_storage(str(tmp_path / "c")))
    assert (manifest.version, manifest.contract.colour, manifest.samples) == (2, "as_stored", 16)
    with pytest.raises(DestinationExists, match="colour: as_stored, not srgb"):
        main(config(first, tmp_path / "c", colour="srgb", **PIXELS))


def test_small_images_of_a_superresolution_are_converted_as_well(tmp_path: Path) -> None:
    colour = Image.new("RGB", (64, 64), (40, 200, 90))
    own = {"icc_profile": rgb_profile()}
    members = [("0.png", file_of(colour, "PNG", **own)), ("0.lr.png", file_of(colour.resize((16, 16)), "PNG", **own))]
    write_tar(tmp_path / "0.tar", members)
    lowres = LowresConfig(factor=4, degradation="file")
    main(config(str(tmp_path / "0.tar"), tmp_path / "c", conditions=("lowres",), lowres=lowres, **PIXELS))
    storage = open_storage(str(tmp_path / "c"))
    record = next(iter(first_records(storage, load_manifest(storage), 1)))
    wanted = meant(np.array([(40, 200, 90)]))[0]
    for name in ("pixels", "cond.lowres"):
        assert np.abs(record.members[name][:, 5, 5] - wanted).max() <= 2, name


def test_profiles_that_are_equal_are_looked_at_once() -> None:
    _conversion.cache_clear()
    picture = file_of(Image.new("RGB", (4, 4)), "PNG", icc_profile=rgb_profile())
    for _ in range(5):
        decoded(picture)
    assert _conversion.cache_info().misses == 1
