"""The files of a source's tar, read by ranges and as strictly as encode reads them, until enough are seen.

The tar is untrusted (SECURITY.md): headers must match their checksums, links and devices are refused, and sizes are
checked against the limits before anything is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from pipeline.config import LimitsConfig
from pipeline.errors import ShardCorrupt
from pipeline.parsing.samples import split_name
from pipeline.parsing.tar import BLOCK, parse_header, pax_fields, pax_size
from pipeline.storage.base import Storage

CHUNK = 4 * 1024 * 1024
"""Bytes of a range that is fetched."""
EXTENSION_BYTES = 64 * 1024
"""Largest extended header."""
HEADERS = (b"x", b"g", b"L", b"K")


@dataclass
class Files:
    """Files of one sample, by suffix. start, end: bytes of the tar that it takes."""

    key: str
    start: int
    end: int
    members: dict[str, bytes] = field(default_factory=dict)


class Ranges:
    """Reads a tar forward by ranges of `chunk` bytes at the least, 0 = CHUNK. read: bytes that were fetched."""

    def __init__(self, storage: Storage, key: str, size: int, chunk: int = 0) -> None:
        self.storage, self.key, self.size, self.chunk = storage, key, size, chunk or CHUNK
        self.read = 0
        self._start, self._held = 0, b""

    def take(self, at: int, count: int) -> bytes:
        """`count` bytes from `at` on, which never goes back. Raises ShardCorrupt where the tar ends before them."""
        if at + count > self.size:
            raise ShardCorrupt(f"{self.storage.locate(self.key)}, byte {at}: it is cut: it ends at byte {self.size}")
        if at + count > self._start + len(self._held) or at < self._start:
            kept = self._held[at - self._start :] if self._start <= at < self._start + len(self._held) else b""
            begin = at + len(kept)
            length = min(max(count - len(kept), self.chunk), self.size - begin)
            self._held = kept + self.storage.get_range(self.key, begin, length)
            self._start = at
            self.read += length
        offset = at - self._start
        return self._held[offset : offset + count]


def files_of(ranges: Ranges, limits: LimitsConfig) -> Iterator[Files]:
    """The samples of a tar in order, with their contents. Raises ShardCorrupt, NotFound, StorageError."""
    current: Files | None = None
    for name, at, length, end in headers_of(ranges, limits):
        stem, suffix = split_name(name)
        if not suffix:
            continue
        if current is None or current.key != stem:
            if current is not None:
                yield current
            current = Files(stem, at - BLOCK, end)
        current.members.setdefault(suffix, ranges.take(at, length))
        current.end = end
    if current is not None:
        yield current


def counted(storage: Storage, key: str, size: int, limits: LimitsConfig, most: int) -> tuple[int, int]:
    """Number of the samples of a tar by its headers alone, which pays on a local disk, and the bytes that they take.
    most: samples after which it ends. Raises ShardCorrupt, NotFound, StorageError."""
    samples, last, end = 0, "", 0
    for name, _, _, end_of_file in headers_of(Ranges(storage, key, size, BLOCK), limits):
        stem, suffix = split_name(name)
        if suffix and stem != last:
            if samples == most:
                return samples, end
            samples, last = samples + 1, stem
        end = end_of_file
    return samples, size


def headers_of(ranges: Ranges, limits: LimitsConfig) -> Iterator[tuple[str, int, int, int]]:
    """(name, place of the content, its bytes, place of what follows) of each file of a tar. Raises ShardCorrupt."""
    at, count, path, given = 0, 0, b"", b""
    while True:
        block = ranges.take(at, BLOCK)
        if not any(block):
            return
        with _located(ranges, at):
            header = parse_header(block)
        count += 1
        if count > limits.members:
            raise _corrupt(ranges, at, f"it has more than limits.members={limits.members} members")
        if header.kind in HEADERS:
            if header.size > EXTENSION_BYTES:
                raise _corrupt(ranges, at, f"an extended header takes {header.size} bytes")
            data = ranges.take(at + BLOCK, header.size)
            if header.kind == b"x":
                with _located(ranges, at):
                    fields = pax_fields(data)
                path, given = fields.get(b"path", path), fields.get(b"size", given)
            elif header.kind == b"L":
                path = data.rstrip(b"\0")
            at += BLOCK + header.size + -header.size % BLOCK
            continue
        with _located(ranges, at):
            length = pax_size(given) if given else header.size
        name = (path or header.name).decode("utf-8", "backslashreplace").removeprefix("./")
        path, given = b"", b""
        start, at = at + BLOCK, at + BLOCK + length + -length % BLOCK
        if header.kind == b"5":
            continue
        if header.kind not in (b"0", b"7"):
            raise _corrupt(ranges, start - BLOCK, f"{name[:100]} is a link, a device or something else that is no file")
        if length > limits.member_bytes:
            raise _corrupt(ranges, start, f"{name[:100]} has {length} bytes, limits.member_bytes={limits.member_bytes}")
        yield name, start, length, at


@contextmanager
def _located(ranges: Ranges, at: int) -> Iterator[None]:
    """Inside, a header at a byte is read: file and byte are named where it is corrupt."""
    try:
        yield
    except ShardCorrupt as error:
        raise _corrupt(ranges, at, str(error)) from None


def _corrupt(ranges: Ranges, at: int, what: str) -> ShardCorrupt:
    return ShardCorrupt(f"{ranges.storage.locate(ranges.key)}, byte {at}: {what}")
