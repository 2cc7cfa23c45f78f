"""Reads input shards, which are untrusted tars, strictly and as a stream into samples.

A truncated or damaged tar always raises ShardCorrupt: headers must match their checksums, members must be complete, two
zero blocks must end the archive and only zeros may follow. Links, devices and names that lead out of the archive are
refused. Sizes and counts are checked against limits before data are read. Nothing is unpickled or written to disk.
Every step of the reader takes it further into the shard, and it ends within one chunk once it is asked to.

Neighbouring members that share a key belong to one sample, as in WebDataset. The key is the name without one of
SUFFIXES, and keeps its dots ("a.b.jpg" has the key "a.b"). A key that occurs again later in the shard becomes a sample
of its own, which is rejected and thereby counted.
"""

from __future__ import annotations

import collections
import hashlib
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from pipeline.config import LimitsConfig
from pipeline.errors import Interrupted, RecordRejected, ShardCorrupt
from pipeline.parsing.samples import FOREIGN_FOLDER as FOREIGN_FOLDER
from pipeline.parsing.samples import IMAGES as IMAGES
from pipeline.parsing.samples import SUFFIXES as SUFFIXES
from pipeline.parsing.samples import split_name as split_name
from pipeline.parsing.tar import BLOCK, parse_header, pax_fields, pax_size
from pipeline.storage.base import Storage
from preprocess.source.advice import AGAIN, advice, no_file, no_tar

CHUNK = 8 * 1024 * 1024  # bytes per read
AHEAD = 3  # chunks that are fetched ahead from a bucket
EXTENSION_BYTES = 64 * 1024  # largest pax header or long name
FIRST, FIRST_LENGTH = 6, 100  # names of files that are kept for messages, and their longest
KEY_LENGTH = 4096  # longest key of a sample, in characters
PROBLEMS = {
    "key_repeated": "files of this key stand in the shard before; those of one sample must stand together",
    "member_repeated": "two of its files have the same suffix",
    "key_too_long": f"its name has more than {KEY_LENGTH} characters",
    "file_too_large": "one of its files has more bytes than limits.member_bytes",
    "metadata_repeated": "it has a .json of its own, and a row in the folder's metadata",
    "row_unreadable": "a value of this row cannot be read, such as a text that is not UTF-8",
    "image_elsewhere": "the table holds no image but a path, which is not followed: store the images in it",
}
"""Reasons for which a sample is rejected as the shard is read, and what they mean."""


@dataclass
class Sample:
    """One sample as it is in the tar. members: contents by suffix. problem: the reason for which it is rejected, or
    ""."""

    key: str
    members: dict[str, bytes] = field(default_factory=dict)
    problem: str = ""

    @property
    def files(self) -> str:
        """What it has, for messages."""
        return f"it has {', '.join(sorted(self.members)) or 'nothing'}"

    def image(self) -> bytes:
        """The bytes of its only image. Raises RecordRejected: image_missing or image_repeated."""
        images = [self.members[suffix] for suffix in IMAGES if suffix in self.members]
        if len(images) != 1:
            raise RecordRejected("image_repeated" if images else "image_missing", self.files)
        return images[0]


class SourceShard:
    """One input shard. Iterate over `samples()` once; after that `sha256`, `bytes` and `passed_over` are those of the
    whole shard.

    Of an object in a bucket, AHEAD chunks are fetched ahead. Close the shard, or use it as a context manager.

    name: its name in a plan, for advice; "" where it is in none. stopped: once it is set, reading raises Interrupted.
    """

    def __init__(
        self,
        storage: Storage,
        key: str,
        limits: LimitsConfig,
        name: str = "",
        stopped: threading.Event | None = None,
    ) -> None:
        self.name, self._stopped = name, stopped
        self.where = storage.locate(key)
        self.bytes = storage.stat(key).size
        self.passed_over = 0
        """Number of files that belong to no sample, such as img2dataset's parquet."""
        self.first: list[str] = []
        """Names of the first files, for messages."""
        self._storage, self._key, self._limits = storage, key, limits
        self._digest = hashlib.sha256()
        self._offset = 0
        self._chunk_rest = memoryview(b"")
        self._ahead: collections.deque[Future[bytes]] = collections.deque()
        self._requested = 0  # bytes requested so far
        remote = storage.local_path(key) is None and self.bytes > CHUNK
        self._fetchers = ThreadPoolExecutor(AHEAD, "latentmill-fetch") if remote else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancels the pending fetches."""
        if self._fetchers is not None:
            self._fetchers.shutdown(cancel_futures=True)

    @property
    def sha256(self) -> str:
        """SHA-256 of all bytes read so far; of the whole shard once its samples have been read."""
        return self._digest.hexdigest()

    @property
    def position(self) -> int:
        """Number of bytes read so far."""
        return self._offset

    def samples(self) -> Iterator[Sample]:
        """Yields the samples in order. Raises ShardCorrupt."""
        current: Sample | None = None
        seen: set[str] = set()
        for name, payload in self._members():
            if len(self.first) < FIRST:
                self.first.append(name if len(name) <= FIRST_LENGTH else f"{name[:FIRST_LENGTH]}...")
            key, suffix = self._split(name)
            if not suffix:
                self.passed_over += 1
                continue
            if current is None or current.key != key:
                if current is not None:
                    yield current
                current = Sample(key, problem="key_repeated" if key in seen else "")
                if len(key) > KEY_LENGTH:
                    current.problem = "key_too_long"
                else:
                    seen.add(key)
            elif suffix in current.members:
                current.problem = "member_repeated"
            current.members[suffix] = payload
        if current is not None:
            yield current

    def _split(self, name: str) -> tuple[str, str]:
        """A file's name -> key and suffix, as `split_name`."""
        return split_name(name)

    # The tar ---------------------------------------------------------------------------------------------------------

    def _members(self) -> Iterator[tuple[str, bytes]]:
        """Yields (name, content) of each file, and checks the whole archive on the way."""
        count = 0
        override: dict[str, bytes] = {}  # name and size from a pax header or a GNU long name, for the next member
        while True:
            at = self._offset
            if at == 0 and self.bytes < BLOCK:
                raise self._corrupt(at, *no_tar(self._read(self.bytes, "a header"), BLOCK))
            block = self._read(BLOCK, "a header")
            if not any(block):
                if override:
                    raise self._corrupt(at, "an extended header stands at the end, without its member")
                break
            try:
                header = parse_header(block)
            except ShardCorrupt as error:
                if at == 0:
                    raise self._corrupt(at, *no_tar(block, BLOCK)) from None
                raise self._corrupt(at, str(error)) from None
            count += 1
            if count > self._limits.members:
                raise self._corrupt(at, f"it has more than limits.members={self._limits.members} members")
            if header.kind in (b"x", b"g", b"L", b"K"):
                if header.size > EXTENSION_BYTES:
                    raise self._corrupt(at, f"an extended header takes {header.size} bytes")
                extension = self._payload(header.size)
                if header.kind == b"x":
                    override |= self._pax(extension, at)
                elif header.kind == b"L":
                    override["path"] = extension.rstrip(b"\0")
                continue
            name = self._checked_name(override.get("path", header.name), at)
            size = self._size(override["size"], at) if "size" in override else header.size
            override = {}
            if header.kind == b"5":
                continue
            if header.kind not in (b"0", b"7"):
                more, first = no_file(header.kind)
                what = f"{name} is a link, a device or something else that is not a file: refused{more}"
                raise self._corrupt(at, what, first)
            if size > self._limits.member_bytes:
                raise self._corrupt(at, f"{name} has {size} bytes, limits.member_bytes={self._limits.member_bytes}")
            yield name, self._payload(size)
        at = self._offset
        if any(self._read(BLOCK, "the second end-of-archive block")):
            raise self._corrupt(at, "data follow a zero block in the middle of the archive")
        while self._offset < self.bytes:
            at = self._offset
            if any(self._read(min(CHUNK, self.bytes - at), "padding")):
                raise self._corrupt(at, "data follow the end of the archive")

    def _payload(self, size: int) -> bytes:
        data = self._read(size, "a member")
        if any(self._read(-size % BLOCK, "a member's padding")):
            raise self._corrupt(self._offset, "a member's padding is not zero")
        return data

    def _read(self, size: int, what: str) -> bytes:
        """Reads the next `size` bytes in chunks. Raises ShardCorrupt when the shard ends before them."""
        if size < 0 or self._offset + size > self.bytes:
            raise self._corrupt(self._offset, f"it is cut in {what}: it ends at byte {self.bytes}")
        parts, remaining = [], size
        while remaining:
            if not self._chunk_rest:
                chunk = self._next_chunk()
                self._digest.update(chunk)
                self._chunk_rest = memoryview(chunk)
            parts.append(bytes(self._chunk_rest[:remaining]))
            self._chunk_rest = self._chunk_rest[remaining:]
            remaining -= len(parts[-1])
            self._offset += len(parts[-1])
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _next_chunk(self) -> bytes:
        """Fetches the next CHUNK bytes, or what remains. Raises Interrupted."""
        if self._stopped is not None and self._stopped.is_set():
            raise Interrupted("stopped while it read a shard")
        if self._fetchers is None:
            start, self._requested = self._requested, min(self._requested + CHUNK, self.bytes)
            return self._storage.get_range(self._key, start, self._requested - start)
        while len(self._ahead) <= AHEAD and self._requested < self.bytes:
            start, self._requested = self._requested, min(self._requested + CHUNK, self.bytes)
            self._ahead.append(
                self._fetchers.submit(self._storage.get_range, self._key, start, self._requested - start)
            )
        return self._ahead.popleft().result()

    def _pax(self, data: bytes, at: int) -> dict[str, bytes]:
        """The fields of a pax header that matter: path and size."""
        try:
            fields = pax_fields(data)
        except ShardCorrupt as error:
            raise self._corrupt(at, str(error)) from None
        return {name: fields[name.encode()] for name in ("path", "size") if name.encode() in fields}

    def _size(self, text: bytes, at: int) -> int:
        try:
            return pax_size(text)
        except ShardCorrupt as error:
            raise self._corrupt(at, str(error)) from None

    def _checked_name(self, raw: bytes, at: int) -> str:
        name = raw.decode("utf-8", "backslashreplace").removeprefix("./")
        if name.startswith("/") or ".." in name.split("/") or "\0" in name or not name.strip("/"):
            if raw.rstrip(b"/") == b".":
                return name
            raise self._corrupt(at, f"member name {name!r} is absolute, empty or leads out of the archive: refused")
        return name

    def _corrupt(self, at: int, what: str, first: str = AGAIN) -> ShardCorrupt:
        """The error for a shard that cannot be read. first: what helps, "" when `what` says it."""
        return ShardCorrupt(f"{self.where}, byte {at}: {what}. {advice(first, self.name)}")
