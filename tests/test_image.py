"""preprocess/image.py and sample.py: every mode becomes RGB, and what cannot be used says why (docs/promises.md, 4)."""

from __future__ import annotations

import io
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from pipeline.config import EncodeConfig, LimitsConfig
from pipeline.errors import RecordRejected
from preprocess.image import centre_crop, crop_image, decode_image
from preprocess.sample import MOST_BOXES, hole, lowres, prepare
from preprocess.source import Sample

PIXELS = 1 << 24


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def decoded(data: bytes) -> np.ndarray:
    image = decode_image(data, PIXELS)
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
        decode_image(data, pixels)
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
    assert decode_image(small, 100).size == (10, 10)


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
    crop = centre_crop(*size, 64)
    assert (crop.resized, crop.left, crop.top, crop.side) == (resized, left, top, 64)


def test_downscaling_is_antialiased_and_centred() -> None:
    stripes = np.zeros((256, 512, 3), dtype=np.uint8)
    stripes[:, ::2] = 255  # finer than the result can show: must average to grey, not alias
    stripes[:, :100] = 0  # outside the middle square after resizing
    image = Image.fromarray(stripes)
    pixels = crop_image(image, centre_crop(512, 256, 64)).astype(int)
    assert pixels.shape == (64, 64, 3)
    assert np.abs(pixels - 127.5).max() < 8


# --------------------------------------------------------------------------------------------------------------------
# Samples


def config(**changes: object) -> EncodeConfig:
    return EncodeConfig(source="", dest="", **changes)  # type: ignore[arg-type]


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
    assert found.pixels.shape == (64, 64, 3)
    assert found.meta() == {
        "key": "k",
        "caption": "a b",
        "tokens": 3,
        "truncated": True,
        "width": 128,
        "height": 64,
        "resized": [128, 64],
        "crop": [32, 0, 64],
    }


def test_captions_in_any_script_and_from_json() -> None:
    text = "крупный красный круг 大きな赤い円 🔴"
    assert prepare(sample(txt=text.encode()), config(), ids).caption == text
    meta = json.dumps({"caption": text}).encode()
    assert prepare(sample(json=meta), config(caption_key="json:caption"), ids).caption == text


def test_each_bad_sample_has_its_reason() -> None:
    no_text = Sample("k", {"png": b""})
    assert reason(no_text) == "caption_missing"
    assert reason(Sample("k", {"txt": b"x"})) == "image_missing"
    assert reason(sample(txt=b"caf\xe9")) == "caption_bad_utf8"
    assert reason(sample(txt=b"  \n")) == "caption_empty"
    assert reason(sample(txt=b"x" * 70_000)) == "caption_too_long"
    assert reason(sample(jpg=b"x")) == "image_repeated"
    from_json = {"caption_key": "json:caption"}
    assert reason(sample(), **from_json) == "caption_missing"
    assert reason(sample(json=b"{}"), **from_json) == "caption_missing"
    assert reason(sample(json=b"{"), **from_json) == "json_unreadable"
    assert reason(sample(json=b"[" * 100_000), **from_json) == "json_unreadable"
    assert reason(sample(json=b"[1]"), **from_json) == "json_unreadable"
    assert reason(sample(json=b'{"caption": 3}'), **from_json) == "caption_not_text"
    assert reason(sample(json=rb'{"caption": "\ud800"}'), **from_json) == "caption_bad_utf8"
    assert reason(sample(), conditions=("boxes",)) == "boxes_missing"
    assert reason(sample(json=b'{"boxes": [[1, 2]]}'), conditions=("boxes",)) == "boxes_unreadable"
    assert reason(sample(json=b'{"boxes": [[1, NaN, 0, 1, 1]]}'), conditions=("boxes",)) == "boxes_unreadable"
    many = json.dumps({"boxes": [[1, 0.4, 0.4, 0.6, 0.6]] * (MOST_BOXES + 1)}).encode()
    assert reason(sample(json=many), conditions=("boxes",)) == "boxes_too_many"
    assert reason(sample(), conditions=("labels",)) == "labels_missing"
    assert reason(sample(labels_png=b"x"), conditions=("labels",)) == "labels_unreadable"
    wrong = encoded(Image.new("L", (64, 64)), "PNG")
    assert reason(sample(labels_png=wrong), conditions=("labels",)) == "labels_size"
    broken = sample()
    broken.problem = "key_repeated"
    assert reason(broken) == "key_repeated"


def test_boxes_move_with_the_crop() -> None:
    """The picture is 128 x 64, the crop its middle 64: the left quarter and the right quarter are gone."""
    given = {"boxes": [[3, 0.25, 0.0, 0.5, 1.0], [4, 0.0, 0.0, 0.2, 0.5], [5, 0.5, 0.5, 1.0, 1.0]]}
    found = prepare(sample(json=json.dumps(given).encode()), config(conditions=("boxes",)), ids).conditions["boxes"]
    assert found.shape == (MOST_BOXES, 5)
    assert found.dtype == np.float16
    assert found[:2].tolist() == [[3, 0, 0, 0.5, 1], [5, 0.5, 0.5, 1, 1]]
    assert (found[2:] == -1).all()


def test_label_maps_are_cropped_like_the_image_without_mixing_classes() -> None:
    labels = np.zeros((128, 256), dtype=np.uint8)
    labels[:, 128:] = 7
    image = encoded(Image.new("RGB", (256, 128)), "PNG")
    one = sample(png=image, labels_png=encoded(Image.fromarray(labels), "PNG"))
    found = prepare(one, config(conditions=("labels",)), ids).conditions["labels"]
    assert found.shape == (64, 64)
    assert (found[:, :32] == 0).all()
    assert (found[:, 32:] == 7).all()


def test_the_low_resolution_image_is_the_mean_of_4_by_4_pixels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    small = lowres(pixels)
    assert small.shape == (3, 16, 16)
    assert small[1, 2, 3] == int(pixels[8:12, 12:16, 1].mean() + 0.5)


def test_holes_depend_on_the_key_alone_and_vary() -> None:
    assert (hole("000001_000002", 64) == hole("000001_000002", 64)).all()
    holes = [hole(f"000000_{row:06d}", 64) for row in range(200)]
    areas = [mask.mean() for mask in holes]
    assert 1 / 16 <= min(areas) <= max(areas) <= 9 / 16 + 0.01
    assert len({mask.tobytes() for mask in holes}) == 200
    middle = np.mean(holes, axis=0)
    assert middle[32, 32] > 0.5 > middle[2, 2]
