"""Files that `sample` is given: read strictly, sizes before pixels, and refused in one line."""

from __future__ import annotations

import io
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import ConfigError
from pipeline.inference.requests import files
from pipeline.inference.requests.files import picture_size, read_file, read_rgb


def png(array: np.ndarray, **options: object) -> bytes:
    return saved(Image.fromarray(array), "PNG", **options)


def saved(picture: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def noise(height: int = 6, width: int = 9) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_pixels_of_a_png_are_given_as_they_are() -> None:
    assert (read_rgb("image", "a.png", png(noise())) == noise()).all()
    assert picture_size("image", "a.png", png(noise())) == (9, 6)


def test_pictures_are_turned_upright_and_greys_and_palettes_become_rgb() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    assert (read_rgb("image", "a.png", png(noise(), exif=exif)) == np.rot90(noise(), -1)).all()
    grey = noise()[..., 0]
    assert (read_rgb("image", "a.png", png(grey)) == grey[..., None]).all()
    palette = Image.fromarray(noise()).quantize(16)
    assert (read_rgb("image", "a.png", saved(palette, "PNG")) == np.asarray(palette.convert("RGB"))).all()


def test_transparency_is_over_white() -> None:
    rgba = np.concatenate([noise(), np.zeros((6, 9, 1), np.uint8)], axis=2)
    rgba[:, 4:, 3] = 255
    read = read_rgb("image", "a.png", png(rgba))
    assert (read[:, :4] == 255).all() and (read[:, 4:] == noise()[:, 4:]).all()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cannot be read as a picture"),
        (b"hello", "cannot be read as a picture"),
        (saved(Image.fromarray(noise()), "BMP"), "cannot be read as a picture .* a whole PNG, JPEG or WebP is wanted"),
        (png(noise(64, 64))[:-40], "is cut or damaged"),
        (png(noise(64, 64))[:-12], "is cut or damaged"),
        (png(noise(64, 64)).replace(b"IDAT", b"IDAT\x00", 1), "is cut or damaged"),
        (saved(Image.fromarray(noise(64, 64)), "JPEG")[:600], "cannot be read as a picture"),
        (png(np.zeros((4, 4), np.uint16)), "has more than 8 bits a channel"),
    ],
)
def test_what_is_no_whole_picture_of_8_bits_is_refused_with_its_key_and_name(data: bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^image=a\.png {message}") as caught:
        read_rgb("image", "folder/a.png", data)
    assert "\n" not in str(caught.value)


def test_16_bits_of_colour_which_pillow_cuts_in_silence_are_refused() -> None:
    data = bytearray(png(noise()))
    data[24] = 16  # bits of a channel, in the header
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    with pytest.raises(ConfigError, match="has more than 8 bits a channel: save it with 8"):
        read_rgb("image", "a.png", bytes(data))


def test_too_many_pixels_bytes_and_scans_are_refused_before_pixels_are_decoded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data = png(noise(64, 64))
    monkeypatch.setattr(files, "MOST_PIXELS", 4095)
    with pytest.raises(ConfigError, match=r"has 64 x 64 pixels, and 4,095 are read at most"):
        picture_size("labels", "a.png", data)
    (tmp_path / "a.png").write_bytes(data)
    monkeypatch.setattr(files, "MOST_BYTES", 100)
    with pytest.raises(ConfigError, match=r"mask=a\.png has [\d,]+ bytes, and 100 are read at most"):
        read_file("mask", str(tmp_path / "a.png"))
    monkeypatch.setattr(files, "MOST_PIXELS", 4096)
    monkeypatch.setattr(files, "MOST_SCANS", 5)
    scans = saved(Image.fromarray(noise(64, 64)), "JPEG", progressive=True)
    with pytest.raises(ConfigError, match="a JPEG of more than 5 scans"):
        picture_size("image", "a.jpg", scans)


def test_a_header_of_a_billion_pixels_is_refused() -> None:
    data = bytearray(png(noise()))
    data[16:24] = (2**15).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    with pytest.raises(ConfigError, match="33,554,432"):
        picture_size("image", "a.png", bytes(data))


def test_a_missing_file_is_said_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"boxes={tmp_path}/a\.json: there is no such file"):
        read_file("boxes", f"{tmp_path}/a.json")
    with pytest.raises(ConfigError, match="there is no such file"):
        read_file("boxes", str(tmp_path))


def test_files_may_be_objects_of_a_store(s3: str) -> None:
    from pipeline.storage.urls import open_storage

    open_storage(s3).put("a/map.png", png(noise()))
    assert read_file("labels", f"{s3}/a/map.png") == png(noise())
    with pytest.raises(ConfigError, match="there is no such file"):
        read_file("labels", f"{s3}/a/other.png")
