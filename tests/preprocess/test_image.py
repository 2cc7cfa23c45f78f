"""image.py and sample.py: every mode becomes RGB, and what cannot be used says why (docs/explained/promises.md, 4)."""

from __future__ import annotations

import io
import json
import re
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.config import EncodeConfig, FiltersConfig, LimitsConfig
from pipeline.config.values.rules import parse_rule
from pipeline.errors import ConfigError, RecordRejected
from preprocess.source.image import crop_image, decode_image, open_image, place_crop
from preprocess.source.recipe import Recipe, bucket_sizes, recipe_of
from preprocess.source.sample import prepare
from preprocess.source.shard import Sample

PIXELS = 1 << 24


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def decoded(data: bytes) -> np.ndarray:
    image = decode_image(open_image(data, LimitsConfig(pixels=PIXELS)), data)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def halves(left: object, right: object, mode: str) -> Image.Image:
    """(16 wide, 8 high): one colour left, another right."""
    image = Image.new(mode, (16, 8), left)  # type: ignore[arg-type]
    image.paste(right, (8, 0, 16, 8))  # type: ignore[arg-type]
    return image


def test_modes_become_rgb_with_the_right_colours() -> None:
    red, blue = (255, 0, 0), (0, 0, 255)
    rgb = halves(red, blue, "RGB")
    cases = {
        "png": encoded(rgb, "PNG"),
        "webp": encoded(rgb, "WEBP", lossless=True),
        "palette": encoded(rgb.convert("P", palette=Image.Palette.ADAPTIVE), "PNG"),
        "rgba": encoded(halves((*red, 255), (*blue, 255), "RGBA"), "PNG"),
        "jpeg": encoded(rgb, "JPEG", quality=95, subsampling=0),
        "cmyk": encoded(halves((0, 255, 255, 0), (255, 255, 0, 0), "CMYK"), "JPEG", quality=95),
    }
    for name, data in cases.items():
        pixels = decoded(data)
        assert np.abs(pixels[4, 2] - red).max() <= 8, name
        assert np.abs(pixels[4, 13] - blue).max() <= 8, name


def test_greys_of_1_8_and_16_bits() -> None:
    assert decoded(encoded(Image.new("L", (4, 4), 200), "PNG"))[0, 0].tolist() == [200] * 3
    assert decoded(encoded(Image.new("1", (4, 4), 1), "PNG"))[0, 0].tolist() == [255] * 3
    sixteen = Image.fromarray(np.full((4, 4), 200 * 256 + 77, dtype=np.uint16))
    assert decoded(encoded(sixteen, "PNG"))[0, 0].tolist() == [200] * 3


def test_transparency_lies_over_white() -> None:
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    assert np.abs(decoded(encoded(half, "PNG"))[0, 0] - [255, 127, 127]).max() <= 1
    grey = Image.new("LA", (4, 4), (0, 0))
    assert decoded(encoded(grey, "PNG"))[0, 0].tolist() == [255] * 3
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    assert decoded(encoded(palette, "PNG", transparency=1))[0, 0].tolist() == [255] * 3
    keyed = Image.new("RGB", (4, 4), (1, 2, 3))
    assert decoded(encoded(keyed, "PNG", transparency=(1, 2, 3)))[0, 0].tolist() == [255] * 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    """Of every stored turn of an upright picture the same upright picture comes out."""
    upright = halves((255, 0, 0), (0, 0, 255), "RGB")
    upright.paste((0, 255, 0), (0, 0, 4, 4))
    back = {2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # Image.Transpose
    stored = upright.transpose(Image.Transpose(turns[back[orientation]])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, "PNG", exif=exif)
    assert (decoded(data) == np.asarray(upright)).all()


def rejected(data: bytes, pixels: int = PIXELS) -> str:
    with pytest.raises(RecordRejected) as caught:
        decode_image(open_image(data, LimitsConfig(pixels=pixels)), data)
    return caught.value.reason


@pytest.mark.parametrize(("form", "options"), [("JPEG", {}), ("PNG", {}), ("WEBP", {}), ("WEBP", {"lossless": True})])
def test_truncated_images_are_told_as_such(form: str, options: dict[str, object]) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, form, **options)
    for share in (0.3, 0.6, 0.95):
        assert rejected(data[: int(len(data) * share)]) == "image_truncated"


def test_what_is_no_image_is_unreadable() -> None:
    assert rejected(b"<!DOCTYPE html><html><body>404 Not Found</body></html>") == "image_unreadable"
    assert rejected(b"") == "image_unreadable"
    gif = encoded(Image.new("L", (4, 4)), "GIF")
    assert rejected(gif) == "image_unreadable"
    png = bytearray(
        encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)), "PNG")
    )
    png[200] ^= 255
    assert rejected(bytes(png)) == "image_unreadable"


def test_a_header_of_60000_by_60000_is_refused_before_decoding() -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )
    assert rejected(bomb, LimitsConfig().pixels) == "image_too_large"
    small = encoded(Image.new("RGB", (10, 10)), "PNG")
    assert rejected(small, 99) == "image_too_large"
    assert open_image(small, LimitsConfig(pixels=100)).size == (10, 10)


@pytest.mark.parametrize(
    ("size", "resized", "left", "top"),
    [
        ((64, 64), (64, 64), 0, 0),
        ((128, 96), (85, 64), 10, 0),
        ((30, 100), (64, 213), 0, 74),
        ((1, 500), (64, 32000), 0, 15968),
    ],
)
def test_the_crop_is_the_middle_after_the_shorter_side_is_resized(
    size: tuple[int, int], resized: tuple[int, int], left: int, top: int
) -> None:
    crop = place_crop(*size, (64, 64), "centre", 0, "k")
    assert (crop.resized, crop.box) == (resized, (left, top, 64, 64))


def test_downscaling_is_antialiased_and_centred() -> None:
    stripes = np.zeros((256, 512, 3), dtype=np.uint8)
    stripes[:, ::2] = 255  # finer than the result can show: must average to grey, not alias
    stripes[:, :100] = 0  # outside the middle square after resizing
    image = Image.fromarray(stripes)
    pixels = crop_image(image, place_crop(512, 256, (64, 64), "centre", 0, "k")).astype(int)
    assert pixels.shape == (64, 64, 3)
    assert np.abs(pixels - 127.5).max() < 8


# --------------------------------------------------------------------------------------------------------------------
# Samples


def config(**changes: object) -> Recipe:
    return recipe_of(EncodeConfig(source="", dest="", **changes))  # type: ignore[arg-type]


def ids(text: str) -> tuple[list[int], int]:
    return [0, 0, 0], len(text.split()) + 2


def sample(**members: bytes) -> Sample:
    names = {name.replace("_", "."): data for name, data in members.items()}
    return Sample("k", {"png": encoded(Image.new("RGB", (128, 64), (9, 9, 9)), "PNG"), "txt": b"a b", **names})


def reason(one: Sample, **changes: object) -> str:
    with pytest.raises(RecordRejected) as caught:
        prepare(one, config(**changes), ids)
    return caught.value.reason


def test_a_sample_is_prepared_with_its_facts() -> None:
    found = prepare(sample(txt=b" a b\n"), config(), ids)
    assert found.pictures[0].pixels.shape == (64, 64, 3)
    assert found.meta() == {
        "key": "k",
        "caption": "a b",
        "tokens": 3,
        "truncated": True,
        "width": 128,
        "height": 64,
        "resized": [128, 64],
        "crop": [32, 0, 64, 64],
    }


def test_captions_in_any_script_and_from_json() -> None:
    text = "крупный красный круг 大きな赤い円 🔴"
    assert prepare(sample(txt=text.encode()), config(), ids).caption == text
    meta = json.dumps({"caption": text}).encode()
    assert prepare(sample(json=meta), config(caption_key=("json:caption",)), ids).caption == text


def test_each_bad_sample_has_its_reason() -> None:
    no_text = Sample("k", {"png": b""})
    assert reason(no_text) == "caption_missing"
    assert reason(Sample("k", {"txt": b"x"})) == "image_missing"
    assert reason(sample(txt=b"caf\xe9")) == "caption_bad_utf8"
    assert reason(sample(txt=b"  \n")) == "caption_empty"
    assert reason(sample(txt=b"x" * 70_000)) == "caption_too_long"
    assert reason(sample(jpg=b"x")) == "image_repeated"
    from_json = {"caption_key": ("json:caption",)}
    assert reason(sample(), **from_json) == "caption_missing"
    assert reason(sample(json=b"{}"), **from_json) == "caption_missing"
    assert reason(sample(json=b"{"), **from_json) == "json_unreadable"
    assert reason(sample(json=b"[" * 100_000), **from_json) == "json_unreadable"
    assert reason(sample(json=b"[1]"), **from_json) == "json_unreadable"
    assert reason(sample(json=b'{"caption": 3}'), **from_json) == "caption_not_text"
    assert reason(sample(json=rb'{"caption": "\ud800"}'), **from_json) == "caption_bad_utf8"
    broken = sample()
    broken.problem = "key_repeated"
    assert reason(broken) == "key_repeated"


# --------------------------------------------------------------------------------------------------------------------
# Crops and buckets


@pytest.mark.parametrize(("resolution", "step"), [(1024, 64), (512, 64), (256, 32), (64, 8)])
def test_buckets_keep_the_area_and_come_in_pairs(resolution: int, step: int) -> None:
    sizes = bucket_sizes(resolution, step, 2.0)
    assert (resolution, resolution) in sizes
    assert len(set(sizes)) == len(sizes) > 3
    for width, height in sizes:
        assert width % step == height % step == 0
        assert (height, width) in sizes
        assert max(width, height) <= 2 * min(width, height)
        # The longer side is the longest that fits.
        assert resolution**2 - step * min(width, height) < width * height <= resolution**2
    assert bucket_sizes(resolution, 0, 2.0) == ((resolution, resolution),)


def test_an_image_goes_to_the_bucket_of_the_nearest_aspect_ratio() -> None:
    target = config(resolution=(64,), buckets=8).targets[0]
    for width, height in ((64, 64), (100, 51), (51, 100), (1000, 100), (640, 480)):
        chosen = target.sizes[target.nearest(width, height)]
        distances = [abs(np.log(width / height * h / w)) for w, h in target.sizes]
        assert abs(np.log(width / height * chosen[1] / chosen[0])) == min(distances)


def test_random_crops_depend_on_key_and_seed_alone_and_reach_every_place() -> None:
    def left(key: str, seed: int = 0) -> int:
        return place_crop(74, 64, (64, 64), "random", seed, key).box[0]

    assert left("a") == left("a")
    places = [left(str(i)) for i in range(1100)]
    assert sorted(set(places)) == list(range(11))
    assert max(abs(places.count(place) - 100) for place in range(11)) < 50
    assert [left(str(i)) for i in range(20)] != [left(str(i), 1) for i in range(20)]
    crop = place_crop(300, 200, (48, 64), "random", 0, "k")
    assert crop.resized == (96, 64)
    assert 0 <= crop.box[0] <= 48
    assert crop.box[1:] == (0, 48, 64)


# --------------------------------------------------------------------------------------------------------------------
# Filters


@pytest.mark.parametrize(
    ("filters", "json_member", "expected"),
    [
        ({"min_side": 65}, {}, "filter:min_side"),
        ({"max_aspect": 1.9}, {}, "filter:max_aspect"),
        ({"min_caption": 4}, {}, "filter:min_caption"),
        ({"max_caption": 2}, {}, "filter:max_caption"),
        ({"keep": ("similarity>=0.3",)}, {"similarity": 0.29}, "filter:similarity>=0.3"),
        ({"keep": ("similarity>=0.3",)}, {"similarity": "0.29"}, "filter:similarity>=0.3"),
        ({"keep": ("a>1", "b<2")}, {"a": 3, "b": 2}, "filter:b<2"),
        ({"keep": ("NSFW==UNLIKELY",)}, {"NSFW": "NSFW"}, "filter:NSFW==UNLIKELY"),
        ({"keep": ("watermark!=1",)}, {"watermark": 1.0}, "filter:watermark!=1"),
        ({"keep": ("similarity>=0.3",)}, {}, "column_missing:similarity"),
        ({"keep": ("similarity>=0.3",)}, {"similarity": None}, "column_missing:similarity"),
        ({"keep": ("similarity>=0.3",)}, {"similarity": "high"}, "column_missing:similarity"),
        ({"keep": ("similarity>=0.3",)}, {"similarity": float("nan")}, "column_missing:similarity"),
    ],
)
def test_each_filter_rejects_under_its_own_name(
    filters: dict[str, Any], json_member: dict[str, Any], expected: str
) -> None:
    one = sample(json=json.dumps(json_member).encode())
    assert reason(one, filters=FiltersConfig(**filters)) == expected


def test_what_filters_let_through_is_what_they_say() -> None:
    filters = FiltersConfig(
        min_side=64, max_aspect=2, min_caption=3, max_caption=3, keep=("similarity >= 0.3", "NSFW==UNLIKELY", "w!=1")
    )
    meta = json.dumps({"similarity": 0.3, "NSFW": "UNLIKELY", "w": 0}).encode()
    assert prepare(sample(json=meta), config(filters=filters), ids).caption == "a b"


@pytest.mark.parametrize("rule", ["similarity", ">=3", "a>=b", "a=3", "a>=3>=2", "a<"])
def test_a_rule_that_cannot_be_meant_is_refused_and_quoted(rule: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(repr(rule))):
        parse_rule(rule)
