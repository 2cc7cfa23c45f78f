"""preprocess/source/shard.py: hostile and damaged tars (docs/explained/promises.md, 4 and 7), and how samples are
told apart."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

import pytest

from pipeline.config import LimitsConfig
from pipeline.errors import RecordRejected, ShardCorrupt
from pipeline.storage.urls import open_storage
from preprocess.source.shard import Sample, SourceShard, split_name

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def make_tar(members: list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for name, payload in members:
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    return out.getvalue()


def open_shard(folder: Path, data: bytes, **limits: int) -> SourceShard:
    (folder / "00000.tar").write_bytes(data)
    return SourceShard(open_storage(str(folder)), "00000.tar", LimitsConfig(**limits))


def read(folder: Path, data: bytes, **limits: int) -> list[Sample]:
    return list(open_shard(folder, data, **limits).samples())


MEMBERS = [
    ("000000001.jpg", b"j" * 700),
    ("000000001.json", b"{}"),
    ("000000001.txt", b"one"),
    ("a.b.c.png", b"p" * 512),
    ("a.b.c.txt", b""),
    ("a.b.labels.png", b"l"),
    ("a.b.png", b"q"),
]


@pytest.mark.parametrize("form", FORMATS)
def test_samples_come_out_whole_and_dotted_keys_stay_apart(tmp_path: Path, form: str) -> None:
    data = make_tar(MEMBERS, FORMATS[form])
    shard = open_shard(tmp_path, data)
    samples = list(shard.samples())
    assert [(s.key, sorted(s.members), s.problem) for s in samples] == [
        ("000000001", ["jpg", "json", "txt"], ""),
        ("a.b.c", ["png", "txt"], ""),
        ("a.b", ["labels.png", "png"], ""),
    ]
    assert samples[0].image() == b"j" * 700
    assert samples[1].members["txt"] == b""
    assert shard.sha256 == hashlib.sha256(data).hexdigest()
    assert shard.bytes == len(data)


@pytest.mark.parametrize("form", ["gnu", "pax"])
def test_long_and_foreign_names_are_read(tmp_path: Path, form: str) -> None:
    long = "folder/" * 30 + "ключ.日本.v2"
    samples = read(tmp_path, make_tar([(f"{long}.jpg", b"x"), (f"{long}.txt", b"y")], FORMATS[form]))
    assert [(s.key, sorted(s.members)) for s in samples] == [(long, ["jpg", "txt"])]


def test_what_is_no_sample_is_passed_over_and_counted(tmp_path: Path) -> None:
    shard = open_shard(tmp_path, make_tar([("00000.parquet", b"P"), ("readme", b"r"), *MEMBERS[:3], ("x/.jpg", b"h")]))
    assert [s.key for s in shard.samples()] == ["000000001"]
    assert shard.passed_over == 3


def test_img2datasets_folders_are_no_samples(tmp_path: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        folder = tarfile.TarInfo("./")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        info = tarfile.TarInfo("./k.jpg")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"x"))
    assert [s.key for s in read(tmp_path, out.getvalue())] == ["k"]


def test_a_key_that_comes_back_is_a_sample_of_its_own_that_cannot_be_used(tmp_path: Path) -> None:
    members = [("a.jpg", b"1"), ("b.jpg", b"2"), ("b.txt", b"t"), ("a.txt", b"3")]
    samples = read(tmp_path, make_tar(members))
    assert [(s.key, s.problem) for s in samples] == [("a", ""), ("b", ""), ("a", "key_repeated")]
    twice = read(tmp_path, make_tar([("a.jpg", b"1"), ("a.jpg", b"2")]))
    assert [(s.key, s.problem) for s in twice] == [("a", "member_repeated")]


def test_an_image_is_one_image() -> None:
    with pytest.raises(RecordRejected, match="image_missing"):
        Sample("k", {"txt": b""}).image()
    with pytest.raises(RecordRejected, match="image_repeated"):
        Sample("k", {"jpg": b"", "png": b""}).image()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jpg", ("a", "jpg")),
        ("a.b.JPEG", ("a.b", "jpeg")),
        ("d/a.labels.png", ("d/a", "labels.png")),
        ("labels.png", ("labels", "png")),
        ("a.jpg.txt", ("a.jpg", "txt")),
        ("a.tiff", ("a.tiff", "")),
        (".jpg", (".jpg", "")),
    ],
)
def test_names_are_split_at_the_suffix(name: str, expected: tuple[str, str]) -> None:
    assert split_name(name) == expected


def test_a_tar_cut_anywhere_is_refused(tmp_path: Path) -> None:
    """At every block, inside headers, inside payloads: nothing short of the two end blocks passes."""
    data = make_tar(MEMBERS)
    whole = len(data.rstrip(b"\0")) // 512 * 512 + 512 + 1024  # the last payload, and the two zero blocks
    lengths = {*range(0, whole, 512), *range(100, whole, 997), whole - 1}
    for length in sorted(lengths):
        with pytest.raises(ShardCorrupt):
            read(tmp_path, data[:length])
    assert len(read(tmp_path, data[:whole])) == 3


def test_a_flipped_bit_in_any_header_is_refused(tmp_path: Path) -> None:
    data = make_tar(MEMBERS[:1])
    for byte in range(512):
        flipped = bytearray(data)
        flipped[byte] ^= 1 << byte % 8
        if byte == 148:  # the checksum's leading 0 became a blank, which says the same
            assert read(tmp_path, bytes(flipped))[0].members == {"jpg": b"j" * 700}
            continue
        with pytest.raises(ShardCorrupt):
            read(tmp_path, bytes(flipped))


def test_a_size_that_lies_is_refused(tmp_path: Path) -> None:
    """A header whose checksum is right and whose size is not: what follows is no header."""
    for size in (0, 511, 10**9):
        info = tarfile.TarInfo("a.jpg")
        info.size = size
        data = info.tobuf(tarfile.USTAR_FORMAT) + b"x" * 1024 + make_tar([("b.jpg", b"y")])
        with pytest.raises(ShardCorrupt):
            read(tmp_path, data)


def test_data_after_the_end_is_refused(tmp_path: Path) -> None:
    """Two tars put one after the other: other readers stop silently at the first one's end."""
    data = make_tar(MEMBERS[:1])
    with pytest.raises(ShardCorrupt, match="follow the end"):
        read(tmp_path, data + data)
    with pytest.raises(ShardCorrupt, match="in the middle"):
        read(tmp_path, data[:1536] + bytes(512) + data)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, b"S", b"V"])
def test_what_is_not_a_file_is_refused(tmp_path: Path, kind: bytes) -> None:
    info = tarfile.TarInfo("a.jpg")
    info.type, info.linkname = kind, "/etc/passwd"
    with pytest.raises(ShardCorrupt, match=r"a\.jpg is a link"):
        read(tmp_path, info.tobuf(tarfile.USTAR_FORMAT) + bytes(1024))


@pytest.mark.parametrize("name", ["/etc/a.jpg", "../a.jpg", "x/../../a.jpg", "..", "./../a.jpg"])
def test_names_that_lead_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ShardCorrupt, match="refused"):
        read(tmp_path, make_tar([(name, b"x")]))
    info = tarfile.TarInfo("innocent.jpg")
    info.pax_headers = {"path": name}
    with pytest.raises(ShardCorrupt, match="refused"):
        read(tmp_path, info.tobuf(tarfile.PAX_FORMAT) + bytes(1024))


def test_limits_hold_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ShardCorrupt, match=r"limits\.member_bytes=699"):
        read(tmp_path, make_tar(MEMBERS), member_bytes=699)
    with pytest.raises(ShardCorrupt, match=r"limits\.members=6"):
        read(tmp_path, make_tar(MEMBERS), members=6)
    assert len(read(tmp_path, make_tar(MEMBERS), member_bytes=700, members=7)) == 3
    huge = tarfile.TarInfo("a.jpg")
    huge.size = 1 << 50  # in base 256
    with pytest.raises(ShardCorrupt, match="limits"):
        read(tmp_path, huge.tobuf(tarfile.GNU_FORMAT) + bytes(1024))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"<html>not found</html>" * 100, "not a tar"),
        (b"", "ends at byte 0"),
        (b"\x1f\x8b" + b"z" * 2000, "gzip-compressed"),
    ],
)
def test_what_is_no_tar_says_so(tmp_path: Path, data: bytes, said: str) -> None:
    with pytest.raises(ShardCorrupt, match=said):
        read(tmp_path, data)


def _pax(record: bytes) -> bytes:
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, len(record)
    return header.tobuf(tarfile.USTAR_FORMAT) + record.ljust(512, b"\0")


@pytest.mark.parametrize("record", [b"12 path=a.jpg\n", b"x", b"99 path=a\n", b"9 pathab\n", b"18 size=1000000x\n"])
def test_damaged_pax_headers_are_refused(tmp_path: Path, record: bytes) -> None:
    with pytest.raises(ShardCorrupt):
        read(tmp_path, _pax(record) + make_tar([("b.jpg", b"y")]))


def test_a_pax_header_without_its_member_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ShardCorrupt, match="without its member"):
        read(tmp_path, _pax(b"14 path=a.jpg\n") + bytes(10240))


@pytest.mark.parametrize("chunk", [512, 700, 1 << 20])
def test_chunks_of_any_size_read_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr("preprocess.source.shard.CHUNK", chunk)
    test_samples_come_out_whole_and_dotted_keys_stay_apart(tmp_path, "pax")


def test_the_error_names_the_shard_and_the_byte(tmp_path: Path) -> None:
    data = bytearray(make_tar(MEMBERS))
    data[1536 + 5] ^= 1
    with pytest.raises(ShardCorrupt, match=r"00000\.tar, byte 1536: a tar header does not match"):
        read(tmp_path, bytes(data))


def test_webdataset_itself_loses_samples_that_we_refuse(tmp_path: Path) -> None:
    import webdataset

    path = tmp_path / "cut.tar"
    path.write_bytes(make_tar(MEMBERS)[: 512 * 5])
    found = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert len(found) < 3  # no error
    with pytest.raises(ShardCorrupt):
        read(tmp_path, path.read_bytes())
