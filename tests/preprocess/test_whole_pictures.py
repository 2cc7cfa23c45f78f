"""preprocess/source/jpeg.py, png.py: a picture that lacks data is rejected, and a whole one is decoded as Pillow does
(docs/explained/promises.md, 4)."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image

from made.hostile import chunk, encoded, photo, png_rows, raw_png
from pipeline.config import LimitsConfig
from pipeline.errors import RecordRejected
from preprocess.source.conditions import open_map
from preprocess.source.image import decode_image, open_image, place_crop
from preprocess.source.jpeg import MOST_SCANS, read_segments
from preprocess.source.png import CHANNELS
from preprocess.source.shard import Sample

END = b"\xff\xd9"
DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
PALETTE = chunk(b"PLTE", bytes(range(6)))


def decoded(data: bytes) -> np.ndarray:
    return np.asarray(decode_image(open_image(data, LimitsConfig()), data))


def reason(data: bytes) -> str:
    """The reason of its rejection; "" for a picture that is taken."""
    try:
        decoded(data)
    except RecordRejected as rejection:
        return rejection.reason
    return ""


# --------------------------------------------------------------------------------------------------------------------
# JPEG


OPTIONS = [
    {},
    {"optimize": True, "quality": 30},
    {"subsampling": 0, "quality": 95},
    {"progressive": True},
    {"progressive": True, "quality": 97, "subsampling": 0},
    {"restart_marker_rows": 1},
    {"restart_marker_blocks": 3, "progressive": True},
]


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", OPTIONS)
def test_whole_jpegs_are_decoded_as_pillow_does(options: dict[str, object], mode: str) -> None:
    for seed, size in enumerate([(1, 1), (8, 8), (17, 5), (64, 48), (150, 97)]):
        data = encoded(photo(*size, seed).convert(mode), "JPEG", **options)
        with Image.open(io.BytesIO(data)) as alone:
            assert (decoded(data) == np.asarray(alone.convert("RGB"))).all()
        assert (decoded(data + b"\0" * 100 + data) == decoded(data)).all()  # cameras append previews


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_jpeg_that_is_cut_and_ended_is_truncated_wherever_it_is_cut(options: dict[str, object], mode: str) -> None:
    """F8: such a picture was taken, with its lower part grey or blurred. Some places stay unseen: between two scans of
    a progressive one, where whole scans are missing, and in the last few bytes."""
    data = encoded(photo(120, 90).convert(mode), "JPEG", **options)
    first = data.index(b"\xff\xda") + 12
    cuts = [data[:cut] + END for cut in np.linspace(first, len(data) - 64, 100).astype(int)]
    reasons = [reason(cut) for cut in cuts]
    assert set(reasons) <= {"image_truncated", "image_unreadable", ""}
    assert reasons.count("") <= (4 if options.get("progressive") else 0)
    assert reasons.count("image_truncated") >= 90


@pytest.mark.parametrize("options", OPTIONS[:4])
def test_a_jpeg_whose_second_half_is_zeros_is_truncated(options: dict[str, object]) -> None:
    """Downloads that take the space first leave such files."""
    data = encoded(photo(120, 90), "JPEG", **options)
    assert reason(data[: len(data) // 2].ljust(len(data), b"\0")) == "image_truncated"


def test_a_whole_jpeg_without_its_end_mark_is_taken() -> None:
    data = encoded(photo(120, 90), "JPEG")
    assert (decoded(data[:-2]) == decoded(data)).all()


def test_a_jpeg_with_a_scan_for_each_colour_is_whole_with_all_three_and_truncated_without_a_part_of_one() -> None:
    """Not interleaved, as few encoders write it; made of three grey pictures here."""
    parts = [encoded(band, "JPEG", quality=80) for band in photo(61, 43).split()]
    frame, scan = parts[0].index(b"\xff\xc0"), parts[0].index(b"\xff\xda")
    sizes = parts[0][frame + 4 : frame + 9]
    colours = b"".join(bytes((number, 0x11, 0)) for number in (1, 2, 3))
    header = b"\xff\xc0" + struct.pack(">H", 17) + sizes + b"\3" + colours
    scans = [
        b"\xff\xda\0\x08\1" + bytes((number, 0)) + b"\0\x3f\0" + part[part.index(b"\xff\xda") + 10 : -2]
        for number, part in enumerate(parts, 1)
    ]
    start = parts[0][:frame] + header + parts[0][frame + 13 : scan]
    data = start + b"".join(scans) + END
    with Image.open(io.BytesIO(data)) as alone:
        assert (decoded(data) == np.asarray(alone.convert("RGB"))).all()
    for cut in (40, len(scans[2]) // 2, len(scans[2]) + 200):
        assert reason(data[: -2 - cut] + END) == "image_truncated"


def test_several_pictures_in_one_jpeg_are_the_first_of_them() -> None:
    data = encoded(photo(64, 48), "MPO", save_all=True, append_images=[photo(64, 48, 1)])
    assert (decoded(data) == decoded(encoded(photo(64, 48), "JPEG"))).all()
    assert reason(data[: data.index(b"\xff\xda") + 300] + END) == "image_truncated"


def test_a_jpeg_without_a_part_of_its_middle_is_truncated_if_it_has_restart_marks() -> None:
    data = encoded(photo(160, 160), "JPEG", restart_marker_rows=1)
    marks = [i for i in range(len(data) - 1) if data[i] == 0xFF and 0xD0 <= data[i + 1] <= 0xD7]
    assert reason(data[: marks[2]] + data[marks[4] :]) == "image_truncated"


def test_a_jpeg_whose_header_says_more_rows_than_it_has_is_truncated() -> None:
    data = bytearray(encoded(photo(64, 64), "JPEG"))
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 2] = struct.pack(">H", 128)
    assert reason(bytes(data)) == "image_truncated"


def test_a_jpeg_with_thousands_of_scans_is_refused_before_it_is_decoded() -> None:
    """F12: each of them takes as long as the picture itself."""
    data = encoded(photo(64, 64).convert("L"), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    scan = data[last:-2]
    assert reason(data[:-2] + scan * 1000 + END) == "image_too_large"
    assert read_segments(data[:-2] + scan * 50 + END).end > 0
    with pytest.raises(RecordRejected, match=f"more than {MOST_SCANS} scans"):
        read_segments(data[:-2] + scan * MOST_SCANS + END)


@pytest.mark.parametrize("flood", [b"\xff\xe5\0\2", b"\xff\xfe\0\3a", b"\xff\xd8", b"\xff", b"\xff\xd0"])
def test_a_header_of_millions_of_segments_is_refused_at_once(flood: bytes) -> None:
    data = encoded(photo(8, 8), "JPEG")
    assert reason(data[:2] + flood * (4_000_000 // len(flood)) + data[2:]) == "image_unreadable"


# --------------------------------------------------------------------------------------------------------------------
# PNG and WebP


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize(("colour", "depth"), [(colour, depth) for colour in DEPTHS for depth in DEPTHS[colour]])
def test_a_png_without_its_last_rows_is_truncated_and_a_whole_one_is_not(
    colour: int, depth: int, interlaced: bool
) -> None:
    """F8: its stream is whole and too short, so Pillow left the other rows black; whole pictures may be black, too."""
    before = PALETTE if colour == 3 else b""
    for size in ((1, 1), (7, 1), (1, 9), (17, 13)):
        for black in (False, True):
            rows = png_rows(size, depth, colour, interlaced=interlaced, black=black)
            whole = raw_png(size, rows, depth, colour, interlaced=interlaced, before=before)
            with Image.open(io.BytesIO(whole)) as alone:
                alone.load()
            assert decoded(whole).shape == (size[1], size[0], 3)
            for length in {len(rows) // 2, len(rows) - 1, 1}:
                cut = raw_png(size, rows[:length], depth, colour, interlaced=interlaced, before=before)
                assert reason(cut) in ("image_truncated", "image_unreadable"), (size, black, length)
    assert len(rows) > CHANNELS[colour]


def test_a_flipped_bit_in_a_png_is_found() -> None:
    data, random = encoded(photo(40, 30), "PNG"), np.random.default_rng(0)
    for _ in range(100):
        flipped = bytearray(data)
        flipped[int(random.integers(data.index(b"IDAT") + 4, len(data) - 20))] ^= 1 << int(random.integers(8))
        assert reason(bytes(flipped)) in ("image_truncated", "image_unreadable")


def test_a_label_map_without_its_last_rows_is_unreadable() -> None:
    cut = raw_png((64, 64), png_rows((64, 64), 8, 0)[: 65 * 32], 8, 0)
    with pytest.raises(RecordRejected, match="labels_unreadable"):
        open_map(Sample("k", {"labels.png": cut}), "labels", place_crop(64, 64, (64, 64), "centre", 0, "k"))


@pytest.mark.parametrize("lossless", [False, True])
def test_a_webp_that_is_cut_and_whose_sizes_are_made_to_fit_is_rejected(lossless: bool) -> None:
    data = encoded(photo(96, 64), "WEBP", lossless=lossless)
    for share in (0.3, 0.6, 0.9, 0.99):
        cut = bytearray(data[: int(len(data) * share) // 2 * 2])
        cut[4:8], cut[16:20] = struct.pack("<I", len(cut) - 8), struct.pack("<I", len(cut) - 20)
        assert reason(bytes(cut)) in ("image_truncated", "image_unreadable")


def test_a_webp_canvas_beyond_the_limit_is_refused_before_its_decoder_takes_memory() -> None:
    canvas = struct.pack("<I", 10_000 - 1)[:3]
    data = b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<II", 10, 0) + canvas * 2
    assert reason(data) == "image_too_large"
