"""What one hostile or damaged sample does to `latentmill encode`: nothing but a counted, listed rejection
(docs/explained/promises.md, 4 and 7)."""

from __future__ import annotations

import io
import json
import re
import struct
import tarfile
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from made.encode import ENCODERS, config, files, png, write_tar
from made.hostile import chunk, encoded, photo, raw_png
from pipeline.config import FiltersConfig, LimitsConfig, VerifyConfig
from pipeline.data.format.manifest import load_manifest
from pipeline.errors import RecordRejected, SourceError
from pipeline.models.encoders.tokenizer import SLOW_LENGTH, load_tokenizer
from pipeline.storage.urls import open_storage
from preprocess import verify
from preprocess.encode import main
from preprocess.encoding.rejects import LISTED, Rejects
from preprocess.source.image import decode_image, open_image
from preprocess.source.recipe import recipe_of
from preprocess.source.rejected import LONGEST, Rejected
from preprocess.source.sample import Prepared, prepare
from preprocess.source.shard import Sample

HUGE = "1" + "0" * 400
"""An integer beyond the range of float64."""


def taken(one: Sample, **changes: Any) -> Prepared:
    """The sample as it is prepared."""
    return prepare(one, recipe_of(config("", "", **changes)), load_tokenizer(ENCODERS).ids)


def reason(one: Sample, **changes: Any) -> str:
    """The reason of its rejection; "" for a sample that is taken."""
    try:
        taken(one, **changes)
    except RecordRejected as rejection:
        return rejection.reason
    return ""


def sample(text: str | bytes = b"a red square", **members: bytes) -> Sample:
    return Sample("k", {"txt": text if isinstance(text, bytes) else text.encode(), **(members or {"png": png()})})


# --------------------------------------------------------------------------------------------------------------------
# Pictures


BROKEN_EXIF = [b"II*\0", b"MM\0*\0\0\0\x08\xff\xff", b"II*\0\x08\0\0\0\x01\0\x12\x01\x05\0\x01\0\0\0\xff\xff\xff\xff"]
BROKEN_EXIF += [b"", b"\0", b"Exif\0\0II*\0", b"II*\0\x08\0\0\0\x01\0\x12\x01\x0a\0\x01\0\0\0\x1a\0\0\0" + bytes(16)]


@pytest.mark.parametrize("exif", BROKEN_EXIF)
@pytest.mark.parametrize(("form", "options"), [("PNG", {}), ("WEBP", {}), ("JPEG", {}), ("JPEG", {"dpi": (72, 72)})])
def test_broken_exif_says_that_a_picture_is_upright(form: str, options: dict[str, object], exif: bytes) -> None:
    """F6: it ended the stage."""
    bare = encoded(photo(64, 48), form)
    data = encoded(photo(64, 48), form, exif=exif, **options)
    pixels = [np.asarray(decode_image(open_image(one, LimitsConfig()), one)) for one in (bare, data)]
    assert (pixels[0] == pixels[1]).all()


def thin_png(width: int, height: int) -> bytes:
    deflate = zlib.compressobj(9)
    body = b"".join(deflate.compress(bytes(1 << 20)) for _ in range(((width + 1) * height >> 20) + 1)) + deflate.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "resolution"),
    [
        (encoded(Image.new("L", (1, 6000)), "PNG"), 512),
        (encoded(Image.new("L", (6000, 1)), "PNG"), 512),
        (encoded(Image.new("L", (65_500, 1)), "JPEG"), 256),
        (encoded(Image.new("RGB", (16_383, 1)), "WEBP"), 512),
        (thin_png(60_000_000, 1), 64),
        (thin_png(1, 60_000_000), 64),
    ],
    ids=["1x6000", "6000x1", "65500x1", "16383x1", "60Mx1", "1x60M"],
)
def test_a_picture_too_thin_to_be_resized_is_rejected_before_it_is_decoded(data: bytes, resolution: int) -> None:
    """F7, H2: it took gigabytes and a minute, or raised OverflowError."""
    started = time.process_time()
    suffix = {b"\x89P": "png", b"\xff\xd8": "jpg", b"RI": "webp"}[data[:2]]
    assert reason(sample(**{suffix: data}), resolution=(resolution,)) == "image_too_large"
    assert time.process_time() - started < 2


def test_a_picture_is_resized_up_to_the_limit_and_sixteen_crops_whatever_it_says() -> None:
    tall = sample(png=encoded(Image.new("L", (4, 60)), "PNG"))  # becomes 64 x 960, 15 crops
    assert reason(tall, limits=LimitsConfig(pixels=1000)) == ""
    taller = sample(png=encoded(Image.new("L", (4, 68)), "PNG"))
    assert reason(taller, limits=LimitsConfig(pixels=1000)) == "image_too_large"
    assert reason(taller) == ""


@pytest.mark.parametrize("kind", [b"iCCP", b"zTXt", b"iTXt"])
def test_what_inflates_to_gigabytes_beside_the_pixels_is_rejected_at_once(kind: bytes) -> None:
    bomb = zlib.compress(bytes(100_000_000), 1)
    body = {b"iCCP": b"a\0\0", b"zTXt": b"a\0\0", b"iTXt": b"a\0\1\0\0\0"}[kind] + bomb
    rows = b"".join(b"\0" + bytes(192) for _ in range(64))
    started = time.process_time()
    assert reason(sample(png=raw_png((64, 64), rows, before=chunk(kind, body)))) in ("", "image_unreadable")
    assert time.process_time() - started < 2


def test_a_png_of_a_million_chunks_is_rejected_at_once() -> None:
    rows = b"".join(b"\0" + bytes(192) for _ in range(64))
    data = raw_png((64, 64), rows, before=chunk(b"aaAa", b"") * 1_000_000)
    assert reason(sample(png=data)) == "image_unreadable"


@pytest.mark.parametrize("form", ["GIF", "BMP", "TIFF", "PPM"])
def test_formats_that_nobody_vouches_for_are_not_opened(form: str) -> None:
    assert reason(sample(jpg=encoded(photo(64, 64), form))) == "image_unreadable"


def test_of_an_animation_the_first_picture_is_used() -> None:
    frames = [Image.new("RGB", (64, 64), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    for suffix in ("webp", "png"):
        options = {"save_all": True, "append_images": frames[1:]} | ({"lossless": True} if suffix == "webp" else {})
        pixels = taken(sample(**{suffix: encoded(frames[0], suffix, **options)})).pictures[0].pixels
        assert pixels[0, 0].tolist() == [255, 0, 0]


def test_random_damage_never_raises_anything_but_a_rejection() -> None:
    random = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = [encoded(photo(40, 30), form, exif=exif) for form in ("JPEG", "PNG", "WEBP")]
    whole += [encoded(photo(40, 30), "JPEG", progressive=True), encoded(photo(40, 30).convert("P"), "PNG")]
    for data in whole:
        for _ in range(150):
            damaged = bytearray(data)
            for place in random.integers(2, len(data), int(random.integers(1, 8))):
                damaged[int(place)] = int(random.integers(256))
            reason(sample(png=bytes(damaged[: int(random.integers(len(data) // 2, len(data) + 1))])))


# --------------------------------------------------------------------------------------------------------------------
# Captions and columns


@pytest.mark.parametrize(
    "text",
    [
        "\ufeff",
        "\0",
        "\0\0 \0",
        "\ufeff \ufeff",
        "\u200b\u200d",
        "\u2060",
        "\xa0\u3000",
        "\x01\x02",
        "\u3164",
        "\u0301",
    ],
)
def test_a_caption_that_shows_nothing_is_empty(text: str) -> None:
    """F14: some were stored as captions that have no token."""
    assert reason(sample(text)) == "caption_empty"
    columns = json.dumps({"caption": text}).encode()
    assert reason(sample(png=png(), json=columns), caption_key=("json:caption",)) == "caption_empty"


def test_a_stored_caption_has_neither_nul_nor_byte_order_mark() -> None:
    found = taken(sample("\ufeffa \0red\0 square\n"))
    assert found.caption == "a red square"
    assert found.ids == taken(sample("a red square")).ids


@pytest.mark.parametrize("entity", ["amp;", "AMP;", "#38;", "#038;", "#x26;", "#X0026;"])
def test_entities_in_entities_do_not_stall_a_worker(entity: str) -> None:
    """M6: 64 kB of them took ten seconds and more."""
    started = time.process_time()
    assert reason(sample("a red square &" + entity * (64_000 // len(entity)) + "lt;")) == ""
    assert reason(sample("a" + "\u0316\u0301" * 16_000)) == ""
    assert time.process_time() - started < 1


def test_long_captions_without_such_tricks_are_read_whole() -> None:
    tokenizer = load_tokenizer(ENCODERS)
    text = "a caf\u00e9 &amp; a tea &lt;house&gt; " * (SLOW_LENGTH // 10)
    assert len(tokenizer.encode(text)) == len(tokenizer.encode(text[: len(text) // 2])) * 2


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ('{"similarity": 0.5}', ""),
        ('{"similarity": 0.5, "other": NaN}', ""),
        (f'{{"similarity": 0.5, "other": {HUGE}}}', ""),
        (r'{"similarity": 0.5, "other": "\ud800"}', ""),
        (f'{{"similarity": {HUGE}}}', "column_missing:similarity"),
        ('{"similarity": NaN}', "column_missing:similarity"),
        ('{"similarity": -Infinity}', "column_missing:similarity"),
        ('{"similarity": 1e999}', "column_missing:similarity"),
        ('{"similarity": [0.5]}', "column_missing:similarity"),
        (f'{{"similarity": "{HUGE}"}}', "column_missing:similarity"),
        ('{"similarity": 0.5, "similarity": 0.1}', "json_unreadable"),
        ('{"similarity": ' + "[" * 100_000, "json_unreadable"),
        ('{"a":' * 5_000 + "1" + "}" * 5_000, "json_unreadable"),
        ('{"similarity": 0.5', "json_unreadable"),
        ("[0.5]", "json_unreadable"),
        ("\ufeff{}", "json_unreadable"),
    ],
)
def test_columns_that_cannot_be_used_are_counted(columns: str, expected: str) -> None:
    """F6, H3: integers beyond float64 ended the stage."""
    filters = FiltersConfig(keep=("similarity>=0.28",))
    assert reason(sample(png=png(), json=columns.encode()), filters=filters) == expected


def test_columns_of_many_megabytes_or_no_utf8_are_rejected_at_once() -> None:
    for data in (b'{"a": "' + b"x" * (17 << 20) + b'"}', b'{"a": "\xff"}', b'{"a": ' + b"9" * 1_000_000 + b"9x}"):
        assert reason(sample(png=png(), json=data), caption_key=("json:caption",)) == "json_unreadable"
    digits = b'{"a": ' + b"9" * 1_000_000 + b', "caption": "a red square"}'
    assert reason(sample(png=png(), json=digits), caption_key=("json:caption",)) == ""


@pytest.mark.parametrize(
    "boxes",
    [
        f"[[0,0,0,1,{HUGE}]]",
        "[[1,2]]",
        "[1,2,3,4,5]",
        '[["1","0","0","1","1"]]',
        "[[true,0,0,1,1]]",
        "[[1.5,0,0,1,1]]",
        "[[-1,0,0,1,1]]",
        "[[4000,0,0,1,1]]",
        "[[1,0,0,1,1e999]]",
        "[[1,0,0,1,NaN]]",
        "[[1,0,0,1,[1]]]",
        '{"a": 1}',
        '"12345"',
        "7",
    ],
)
def test_boxes_that_are_no_boxes_are_rejected(boxes: str) -> None:
    one = sample(png=png(), json=f'{{"boxes": {boxes}}}'.encode())
    assert reason(one, conditions=("boxes",)) == "boxes_unreadable"


# --------------------------------------------------------------------------------------------------------------------
# The stage


def write_hostile(folder: Path) -> str:
    """A shard of six good samples and eight that ended the stage or were taken."""
    cut = encoded(photo(64, 64), "JPEG")
    bad = [
        ("thin.png", encoded(Image.new("L", (1, 60_000)), "PNG")),
        ("cut.jpg", cut[: len(cut) // 2] + b"\xff\xd9"),
        ("black.png", raw_png((64, 64), (b"\0" + bytes(192)) * 32)),
        ("palette.png", raw_png((64, 64), (b"\0" + bytes(64)) * 64, 8, 3)),
        ("page\x1b[31m.jpg", b"<html>404</html>"),
        ("mark.png", png()),
    ]
    members = []
    for i in range(6):
        members += [(f"{i}.png", png(seed=i)), (f"{i}.txt", f"picture {i}".encode())]
    for name, data in bad:
        members += [(name, data), (f"{name[:-4]}.txt", b"\xef\xbb\xbf" if name == "mark.png" else b"words")]
    members += [("exif.png", encoded(photo(64, 64), "PNG", exif=b"II*\0")), ("exif.txt", b"an upright photograph")]
    members += [("._0.jpg", b"\0\5\x16\7"), ("__MACOSX/1.jpg", b"\0\5\x16\7"), ("folder/.DS_Store", b"Bud1")]
    folder.mkdir(exist_ok=True)
    write_tar(folder / "a.tar", members)
    return str(folder / "a.tar")


REJECTED = {"image_too_large": 1, "image_truncated": 2, "image_unreadable": 2, "caption_empty": 1}


@pytest.mark.parametrize("decode_in", ["threads", "processes"])
def test_hostile_samples_are_counted_and_listed_and_the_others_are_encoded(tmp_path: Path, decode_in: str) -> None:
    source = write_hostile(tmp_path / "s")
    assert main(config(source, tmp_path / "c", max_rejects=1.0, decode_in=decode_in)) == 0
    (unit,) = load_manifest(open_storage(str(tmp_path / "c"))).units
    assert (unit.read, unit.accepted, unit.rejected) == (13, 7, REJECTED)
    assert json.loads((tmp_path / "c/units/000000.json").read_text())["passed_over"] == 3
    listed = [json.loads(line) for line in (tmp_path / "c/units/000000.rejected.jsonl").read_text().splitlines()]
    assert [(row["key"], row["reason"]) for row in listed] == [
        ("thin", "image_too_large"),
        ("cut", "image_truncated"),
        ("black", "image_truncated"),
        ("palette", "image_unreadable"),
        ("page\\x1b[31m", "image_unreadable"),
        ("mark", "caption_empty"),
    ]
    assert listed[0]["message"].startswith("1 x 60000 pixels would become 64 x 3840000 to cover a crop of 64 x 64")
    assert listed[2]["message"] == "it holds 6176 of 12352 bytes of pixels"
    assert b"0x" not in (tmp_path / "c/units/000000.rejected.jsonl").read_bytes()


def test_the_lists_are_the_same_bytes_whoever_decodes_and_are_named_by_what_tells_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_hostile(tmp_path / "s")
    for name, changes in {"a": {}, "b": {"workers": 1, "decode_in": "processes"}}.items():
        main(config(source, tmp_path / name, max_rejects=1.0, **changes))
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert "listed in units/*.rejected.jsonl" in capsys.readouterr().out
    assert "units/NNNNNN.rejected.jsonl" in (tmp_path / "a/card.html").read_text()
    assert verify.main(VerifyConfig(dataset=str(tmp_path / "a"), source=source, min_psnr=0)) == 0
    assert "7 records = 13 read - 6 rejected (listed in units/*.rejected.jsonl)" in capsys.readouterr().out


def test_rejected_samples_are_listed_on_s3_as_on_a_disk(tmp_path: Path, s3: str) -> None:
    source, name = write_hostile(tmp_path / "s"), "units/000000.rejected.jsonl"
    main(config(source, tmp_path / "c", max_rejects=1.0))
    main(config(source, f"{s3}/c", max_rejects=1.0))
    assert open_storage(f"{s3}/c").get(name) == (tmp_path / "c" / name).read_bytes()


def test_a_source_without_rejects_has_no_list(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("a.png", png()), ("a.txt", b"a red square")])
    main(config(str(tmp_path / "a.tar"), tmp_path / "c"))
    assert sorted(path.name for path in (tmp_path / "c/units").iterdir()) == ["000000.json"]


def test_a_list_is_bounded_and_so_is_what_is_logged(capfd: pytest.CaptureFixture[str]) -> None:
    rejects = Rejects("a.tar")
    for i in range(1000):
        rejects.add(Rejected(f"k{i}", "sample_failed", "ValueError"))
    rejects.add(Rejected("x" * LONGEST, "image_missing", "y" * LONGEST))
    assert rejects.counts == {"sample_failed": 1000, "image_missing": 1}
    assert rejects.lines().count(b"\n") == LISTED + 1
    logged = capfd.readouterr().err.splitlines()
    assert 1 <= len(logged) < 10
    assert "a.tar: sample k0 is rejected as sample_failed: ValueError" in logged[0]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["s.input.jpg", "s.outputs.txt"], r"first files are s\.input\.jpg, s\.outputs\.txt\. A sample is KEY\.jpg"),
        (["a.jpg", "b.jpg", "a.txt", "b.txt"], r"do not stand together: pack it with tar --sort=name"),
        (["._a.jpg", "._a.txt", "notes.md"], r"none of 0 samples is usable; its first files are \._a\.jpg"),
    ],
)
def test_a_shard_of_which_nothing_is_usable_says_what_it_has_and_what_is_looked_for(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], names: list[str], said: str
) -> None:
    """F11: reasons alone misled."""
    write_tar(tmp_path / "a.tar", [(name, b"words" if name.endswith("txt") else png()) for name in names])
    with pytest.raises(SourceError, match="holds no usable sample"):
        main(config(str(tmp_path / "a.tar"), tmp_path / "c"))
    assert re.search(said, capfd.readouterr().err)
    with pytest.raises(SourceError, match=said if "none of 0" not in said else "none of the first 0"):
        main(config(str(tmp_path / "a.tar"), tmp_path / "d", dry_run=True))


def test_a_tar_that_a_mac_made_keeps_every_sample(tmp_path: Path) -> None:
    """F11: `._a.jpg` beside each file made every sample look repeated."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for i in range(6):
            for suffix, data in (("jpg", encoded(photo(64, 64, i), "JPEG")), ("txt", f"picture {i}".encode())):
                for name, content in ((f"x/._{i}.{suffix}", b"\0\5\x16\7"), (f"x/{i}.{suffix}", data)):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    (tmp_path / "a.tar").write_bytes(out.getvalue())
    main(config(str(tmp_path / "a.tar"), tmp_path / "c"))
    (unit,) = load_manifest(open_storage(str(tmp_path / "c"))).units
    assert (unit.read, unit.accepted) == (6, 6)
