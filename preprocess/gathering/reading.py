"""Reads one file of a folder whole, and notices that it is not the one that was listed."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from pipeline.errors import NotFound, StorageError
from pipeline.storage.base import Storage

CHUNK = 8 * 1024 * 1024  # bytes of a file too large to be held


class _Chunks(Protocol):
    def __call__(self) -> Iterator[bytes]: ...


@dataclass(frozen=True)
class Read:
    """What was read. data: None for a file that is too large to be held, and for one with a problem. problem: what is
    wrong with it, "" for nothing. chunks: reads a large one piece by piece."""

    data: bytes | None
    problem: str = ""
    chunks: _Chunks | None = None

    def parts(self) -> Iterator[bytes]:
        """All bytes of the file, in pieces. Raises StorageError where a large one has changed meanwhile."""
        if self.data is not None:
            yield self.data
        elif self.chunks is not None:
            yield from self.chunks()


def read_local(storage: Storage, path: str, size: int, most: int) -> Read:
    """A local file of `size` bytes; one of more than `most` is not held. No link is followed."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return Read(None, "is gone")
    except OSError as error:
        return Read(None, f"cannot be read ({error.strerror})")
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size != size:
            return Read(None, f"has changed: it had {size:,} bytes when its folder was listed")
        if size > most:
            return Read(None, chunks=lambda: _pieces(path, size))
        data = os.read(descriptor, size) if size else b""
        while len(data) < size and (more := os.read(descriptor, size - len(data))):
            data += more
    except OSError as error:
        return Read(None, f"cannot be read ({error.strerror})")
    finally:
        os.close(descriptor)
    return Read(data) if len(data) == size else Read(None, f"has changed: it ends at byte {len(data):,} of {size:,}")


def _pieces(path: str, size: int) -> Iterator[bytes]:
    left = size
    with open(path, "rb") as file:
        while left and (data := file.read(min(CHUNK, left))):
            yield data
            left -= len(data)
    if left:
        raise StorageError(f"{path} has changed while it was read: run this again")


def read_remote(storage: Storage, key: str, size: int, most: int) -> Read:
    """The same of an object in a bucket."""
    try:
        if size > most:
            return Read(None, chunks=lambda: _ranges(storage, key, size))
        data = storage.get(key)
    except NotFound:
        return Read(None, "is gone")
    return Read(bytes(data)) if len(data) == size else Read(None, f"has changed: it had {size:,} bytes when listed")


def _ranges(storage: Storage, key: str, size: int) -> Iterator[bytes]:
    for start in range(0, size, CHUNK):
        yield storage.get_range(key, start, min(CHUNK, size - start))
