"""Inputs of encode and index that are hostile or damaged: pictures, captions, columns, tars."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from PIL import Image

from scripts.faults.base import ENCODE
from scripts.faults.trial import Case

GOOD = 12
"""Whole samples beside the one that is tried, so that it is less than max_rejects."""


def picture(form: str = "JPEG", size: tuple[int, int] = (64, 64), mode: str = "RGB", **options: object) -> bytes:
    """A picture of one colour."""
    out = io.BytesIO()
    Image.new(mode, size, 90 if mode in ("L", "I;16", "P", "1") else None).save(out, form, **options)  # type: ignore[arg-type]
    return out.getvalue()


def write(folder: Path, members: list[tuple[str, bytes]], name: str = "in/00000.tar") -> Path:
    """A tar of GOOD whole samples and then `members`."""
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    whole = [pair for i in range(GOOD) for pair in ((f"{i:03d}.jpg", picture()), (f"{i:03d}.txt", b"a red circle"))]
    with tarfile.open(path, "w") as tar:
        for member, data in [*whole, *members]:
            info = tarfile.TarInfo(member)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width: int, height: int, rows: int, depth: int = 8, colour: int = 2, extra: bytes = b"") -> bytes:
    """A PNG whose header says width and height and whose stream, which is whole, holds `rows` rows of zeros."""
    row = 1 + (width * depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour] + 7) // 8
    squeeze = zlib.compressobj(9)
    body = b"".join(squeeze.compress(bytes(row)) for _ in range(rows)) + squeeze.flush()
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def pictures() -> dict[str, bytes]:
    """Pictures that must be counted, and must not stop the stage."""
    noise = io.BytesIO()
    Image.effect_noise((256, 256), 80).convert("RGB").save(noise, "JPEG", quality=95)
    jpeg = noise.getvalue()
    return {
        "empty": b"",
        "text": b"<html>404</html>",
        "a JPEG cut at 40 %": jpeg[: len(jpeg) * 2 // 5],
        "a JPEG cut at 40 %, with an end marker": jpeg[: len(jpeg) * 2 // 5] + b"\xff\xd9",
        "a PNG of half its rows": png_of(64, 64, 32),
        "a PNG of 60,000,000 x 1": png_of(60_000_000, 1, 1, colour=0),
        "a PNG of 1 x 60,000,000": png_of(1, 60_000_000, 10, colour=0),
        "a PNG of 1 x 6,000": picture("PNG", (1, 6000)),
        "a JPEG of 65,500 x 1": picture("JPEG", (65500, 1)),
        "a WebP of 16,383 x 1": picture("WEBP", (16383, 1)),
        "a PNG of 2**31 x 2**31": png_of(2**31 - 1, 2**31 - 1, 0),
        "a PNG with EXIF of 4 bytes": png_of(64, 64, 64, extra=chunk(b"eXIf", b"II*\0")),
        "a PNG with text of 100 MB": png_of(
            64, 64, 64, extra=chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(10**8), 9))
        ),
        "a PNG with a damaged profile": png_of(64, 64, 64, extra=chunk(b"iCCP", b"p\0\0" + b"x" * 50)),
        "a PNG of a palette without colours": png_of(64, 64, 64, colour=3),
        "a GIF as jpg": picture("GIF", mode="P"),
        "a TIFF as jpg": picture("TIFF"),
        "an ICO as jpg": picture("ICO"),
    }


def texts() -> dict[str, tuple[str, bytes]]:
    """Captions and columns: name: (suffix, bytes)."""
    return {
        "no UTF-8": ("txt", b"\xff\xfe\xfa"),
        "empty": ("txt", b""),
        "blanks": ("txt", b" \n\t "),
        "NUL bytes": ("txt", b"\0\0"),
        "a BOM": ("txt", b"\xef\xbb\xbf"),
        "zero width": ("txt", "\u200b\u200b".encode()),
        "64 kB of nested entities": ("txt", b"&amp;" * 13_000),
        "64 kB of nested entities, deep": ("txt", b"&" + b"amp;" * 16_000),
        "60 MB": ("txt", b"word " * 12_000_000),
        "escapes": ("txt", b"\x1b[31mred"),
        "a json that is none": ("json", b"{"),
        "a json of 200,000 lists": ("json", b"[" * 200_000),
        "a json integer of 400 digits": ("json", b'{"similarity": 1' + b"0" * 400 + b"}"),
        "a json of NaN": ("json", b'{"similarity": NaN}'),
        "a json list": ("json", b"[1]"),
        "a json with half a surrogate pair": ("json", b'{"similarity": 1, "x": "\\ud800"}'),
        "boxes of 400 digits": ("json", b'{"similarity": 1, "boxes": [[0,0,0,1,1' + b"0" * 400 + b"]]}"),
    }


def tars() -> dict[str, bytes]:
    """Whole tars that are damaged; the shard must be refused by name."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for i in range(4):
            for suffix, data in (("jpg", picture()), ("txt", b"a circle")):
                info = tarfile.TarInfo(f"{i}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    whole = out.getvalue()

    def sized(field: bytes) -> bytes:
        header = bytearray(whole[:512])
        header[124:136] = field.ljust(12, b"\0")
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        return bytes(header) + whole[512:]

    return {
        "empty": b"",
        "cut in a header": whole[:700],
        "cut in a member": whole[:1100],
        "without an end": whole[:-10240] if len(whole) > 10240 else whole[:512],
        "a negative size": sized(b"-0000001000"),
        "a size of -1": sized(b"-1"),
        "a size of 2**80": sized(b"\x80" + b"\xff" * 11),
        "a negative size in base 256": sized(b"\xff" * 12),
        "gzip": b"\x1f\x8b" + whole,
        "zeros": bytes(10240),
        "a byte that is flipped in a header": whole[:3] + b"\xff" + whole[4:],
        "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 5\n",
        "data behind the end": whole + b"x" * 512,
    }


def cases() -> Iterator[Case]:
    """All of them."""
    words = ("encode", "source=in/*.tar", "dest=made", *ENCODE)
    for name, data in pictures().items():
        members = [("zzz.jpg" if "jpg" in name else "zzz.png", data), ("zzz.txt", b"a line")]
        yield Case(
            "pictures", name, words, partial(write, members=members), "done", "1[23] records of 13|13 samples read"
        )
        big = (*words, "resolution=512", "batch=1") if "x" in name and "JPEG of" in name else None
        if big:
            yield Case("pictures", f"{name} at 512", big, partial(write, members=members), "done")
    for name, (suffix, data) in texts().items():
        members = [("zzz.jpg", picture()), (f"zzz.{suffix}", data)] + (
            [("zzz.txt", b"a line")] if suffix == "json" else []
        )
        more = ("filters.keep=[similarity>=0.5]", "max_rejects=1") if suffix == "json" else ()
        yield Case(
            "captions and columns",
            name,
            (*words, *more),
            partial(write, members=members),
            "done" if not more else "either",
        )
    for name, data in tars().items():

        def put(folder: Path, data: bytes = data) -> None:
            write(folder, [])
            (folder / "in/00001.tar").write_bytes(data)

        wants = "done" if name == "zeros" else "refused"
        yield Case("source tars", name, words, put, wants, "" if wants == "done" else "00001.tar")
        yield Case("tars for index", name, ("index", "dataset=in", "source=in/*.tar", "encoders=demo"), put, "refused")
