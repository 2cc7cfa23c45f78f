"""preprocess/source/shard.py: whatever an input shard holds, reading it ends, at once where it is damaged and within a
chunk where a stop is asked for, and what is said helps (docs/explained/promises.md, 7)."""

from __future__ import annotations

import os
import re
import signal
import tarfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from made.encode import config, png, write_tar
from pipeline.config import LimitsConfig
from pipeline.errors import Interrupted, LatentmillError, NotFound, ShardCorrupt
from pipeline.storage.local import LocalStorage
from preprocess.encode import main
from preprocess.source import shard as module
from preprocess.source.advice import argument
from preprocess.source.shard import SourceShard, split_name


def header(size: bytes, kind: bytes = b"0", name: bytes = b"a.jpg") -> bytes:
    """A tar header with any bytes as its size, and a right checksum."""
    block = bytearray(name.ljust(124, b"\0") + size.ljust(12, b"\0") + b"0" * 12 + b" " * 8 + kind).ljust(512, b"\0")
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def read(folder: Path, data: bytes, name: str = "", **limits: int) -> list[Any]:
    (folder / "0.tar").write_bytes(data)
    with SourceShard(LocalStorage(folder), "0.tar", LimitsConfig(**limits), name) as shard:
        return list(shard.samples())


ENORMOUS = [b"\x80" + b"\xff" * 11, b"7" * 11]
SIZES = [b"-0000001000", b"-1", b"-777", b"+1", b"0x10", b"1_0", b" - 1", b"\xff" * 12, b"99", *ENORMOUS]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", [b"0", b"x", b"g", b"L", b"K", b"5"])
def test_a_size_that_no_member_can_have_ends_the_shard_at_once(tmp_path: Path, size: bytes, kind: bytes) -> None:
    """H1: a negative one was read for ever, obeying no signal."""
    started = time.process_time()
    rest = 512 if kind == b"5" and size in ENORMOUS else 10_240  # a folder has no content, whatever its size
    with pytest.raises(ShardCorrupt):
        read(tmp_path, header(size, kind) + bytes(rest))
    assert time.process_time() - started < 1


@pytest.mark.parametrize("record", [b"11 size=-1\n", b"12 size=1e3\n", b"40 size=99999999999999999999999999999\n"])
def test_a_size_in_a_pax_header_that_no_member_can_have_ends_the_shard(tmp_path: Path, record: bytes) -> None:
    data = header(b"%o" % len(record), b"x") + record.ljust(512, b"\0") + header(b"1") + b"x".ljust(512, b"\0")
    with pytest.raises(ShardCorrupt):
        read(tmp_path, data + bytes(1024))


def test_names_without_end_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("x/" * 2500 + "a.jpg"))
    (sample,) = read(tmp_path, path.read_bytes())
    assert sample.problem == "key_too_long"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("x/" * 50_000 + "a.jpg"))
    with pytest.raises(ShardCorrupt, match="extended header takes"):
        read(tmp_path, path.read_bytes())


# --------------------------------------------------------------------------------------------------------------------
# What is said


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
SAID = [
    (
        b"\x1f\x8b" + bytes(2000),
        r"it is gzip-compressed: unpack it with gunzip\. Or leave it out: leave_out=\[a/0\.tar\]$",
    ),
    (b"PK\3\4" + bytes(2000), r"zip archive: unzip it, and pack the files with tar --sort=name\. Or leave it out"),
    (POINTER, r"a pointer of Git LFS\. Get the file itself with git lfs pull, or leave it out: leave_out="),
    (b"<!DOCTYPE html><html>" + b"x" * 600, r"web page, not a tar\. Fetch it again, or leave it out: leave_out="),
    (b"<?xml version='1.0'?><Error/>", r"web page, not a tar"),
    (b"x" * 2000, r"it is not a tar\. Fetch it again, or leave it out: leave_out=\[a/0\.tar\]$"),
    (b"", r"it ends at byte 0\. Fetch it again"),
    (
        header(b"0", b"1"),
        r"a\.jpg is a link.* \(it is a hard link\)\. Pack it again with tar --dereference --hard-deref",
    ),
    (header(b"0", b"2"), r"a\.jpg is a link.* \(it is a symbolic link\)\. Pack it again with tar --dereference"),
    (header(b"0", b"6"), r"a\.jpg is a link, a device .*: refused\. Pack it again with plain files alone, or"),
]


@pytest.mark.parametrize(("data", "said"), SAID)
def test_what_is_said_of_a_shard_that_cannot_be_read_helps(tmp_path: Path, data: bytes, said: str) -> None:
    """F4, F14: "Fetch it again" helps neither with a link nor with a compressed file."""
    with pytest.raises(ShardCorrupt, match=said):
        read(tmp_path, data, name="a/0.tar")


def test_a_shard_of_no_plan_is_not_left_out_by_a_key(tmp_path: Path) -> None:
    with pytest.raises(ShardCorrupt, match=r"Fetch it again, or leave it out$"):
        read(tmp_path, b"x" * 2000)


@pytest.mark.parametrize(
    ("name", "word"),
    [("a/0.tar", "[a/0.tar]"), ("a b.tar", "'a b.tar'"), ("a,'\".tar", """'a,'"'"'".tar'""")],
)
def test_a_name_is_quoted_as_a_shell_and_the_command_line_want_it(name: str, word: str) -> None:
    assert argument(name) == word


@pytest.mark.parametrize(
    "name",
    ["._a.jpg", "x/._a.txt", "__MACOSX/a.jpg", "x/__MACOSX/y/a.jpg", "__MACOSX/._a.jpg", "x/.DS_Store", "._.DS_Store"],
)
def test_what_a_mac_puts_beside_files_belongs_to_no_sample(name: str) -> None:
    assert split_name(name)[1] == ""
    assert split_name("x_.a._b.jpg") == ("x_.a._b", "jpg")


# --------------------------------------------------------------------------------------------------------------------
# Stopping


def test_a_reader_that_is_asked_to_stop_ends_within_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 4096)
    write_tar(tmp_path / "0.tar", [(f"{i}.bin", bytes(2000)) for i in range(100)])
    stopped = threading.Event()
    with SourceShard(LocalStorage(tmp_path), "0.tar", LimitsConfig(), stopped=stopped) as shard:
        members = shard._members()
        next(members)
        stopped.set()
        with pytest.raises(Interrupted):
            list(members)
        assert shard.position < 8192


def test_sigterm_ends_a_stage_that_reads_a_shard_without_any_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waited for the end of the shard, which may be terabytes away."""
    monkeypatch.setattr(module, "CHUNK", 512)
    get_range, asked = LocalStorage.get_range, list[float]()

    def slow(self: LocalStorage, key: str, offset: int, length: int) -> bytes:
        if key == "0.tar" and offset == 5120:
            asked.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.02 if offset > 5120 else 0)
        return get_range(self, key, offset, length)

    monkeypatch.setattr(LocalStorage, "get_range", slow)
    source = tmp_path / "s"
    source.mkdir()
    write_tar(source / "0.tar", [(f"{i}.bin", bytes(500)) for i in range(2000)])  # 80 s
    with pytest.raises(Interrupted):
        main(config(str(source / "0.tar"), tmp_path / "c"))
    assert time.monotonic() - asked[0] < 5


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_no_file_is_no_shard(tmp_path: Path, make: Any) -> None:
    make(tmp_path / "0.tar")
    with pytest.raises(NotFound):
        SourceShard(LocalStorage(tmp_path), "0.tar", LimitsConfig())
    (tmp_path / "1.tar").symlink_to("/dev/zero")
    with pytest.raises(NotFound):
        SourceShard(LocalStorage(tmp_path), "1.tar", LimitsConfig())
    for name in ("0.tar", "1.tar"):
        with pytest.raises(LatentmillError, match=re.escape(name)):
            main(config(str(tmp_path / name), tmp_path / "c"))


def test_a_shard_that_shrinks_while_it_is_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 4096)
    write_tar(tmp_path / "0.tar", [(f"{i}.png", png()) for i in range(10)])
    with SourceShard(LocalStorage(tmp_path), "0.tar", LimitsConfig()) as shard:
        samples = shard.samples()
        next(samples)
        os.truncate(tmp_path / "0.tar", 5000)
        with pytest.raises(LatentmillError, match=r"0\.tar"):
            list(samples)
