"""What a store can do: the interface, keys, errors."""

from __future__ import annotations

import errno
import re
import secrets
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import NotFound, StorageError

TEMPORARY = re.compile(r"\.[^/]+\.[0-9a-f]{16}\.tmp")
"""Names of files that are being written; never listed."""


@dataclass(frozen=True)
class ObjectInfo:
    """What a store knows of an object without reading it."""

    key: str
    """Relative to the storage that was asked."""
    size: int
    """Bytes."""
    etag: str
    """Changes when the object does; comparable only within one store."""


class Storage(ABC):
    """A root under which objects lie. All methods are safe to call from several threads."""

    url: str

    @abstractmethod
    def get(self, key: str) -> bytes:
        """The whole object. Raises NotFound, StorageError."""

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`. Raises NotFound, and StorageError when the object ends before that."""
        data = bytearray(length)
        self.read_into(key, offset, memoryview(data))
        return bytes(data)

    @abstractmethod
    def read_into(self, key: str, offset: int, view: memoryview) -> None:
        """Fills `view` with the bytes from `offset` on. Raises as `get_range`."""

    @abstractmethod
    def put(self, key: str, data: bytes) -> None:
        """Write the object, whole or not at all, over whatever is there."""

    @abstractmethod
    def put_file(self, key: str, path: Path) -> None:
        """Make a finished local file the object, whole or not at all, over whatever is there. It may be larger than
        memory. The file is consumed: `path` is gone after success, and stays where the object could not be written.
        Raises NotFound when there is no such file, StorageError."""

    @abstractmethod
    def staging_path(self) -> Path:
        """Where to write a file that is meant for `put_file`: a new name at every call, with nothing there yet, never
        listed, and on the storage's own file system if it has one (publishing is then a rename). On S3 a name in the
        system's temporary folder (TMPDIR). The caller removes what it does not publish. Raises StorageError."""

    @abstractmethod
    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write the object unless there is one. False: there is one already, possibly this very call's own after a
        retried request, so compare bytes before calling it somebody else's."""

    @abstractmethod
    def stat(self, key: str) -> ObjectInfo:
        """Size and etag. Raises NotFound."""

    @abstractmethod
    def list(self, prefix: str = "") -> list[ObjectInfo]:
        """Every object whose key starts with `prefix` (a string, not a folder), at any depth, sorted by key."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove the object; no error when there is none."""

    @abstractmethod
    def local_path(self, key: str) -> Path | None:
        """Where the object lies on this machine's disk, or None."""

    @abstractmethod
    def child(self, prefix: str) -> Storage:
        """The storage whose root is `prefix` under this one."""

    @abstractmethod
    def sweep(self, seconds: float) -> None:
        """Remove files of writers that were killed: half-written ones that nobody has written to for `seconds`.

        Nothing where writers leave none (S3: a bucket's lifecycle rule ends uploads that were cut off).
        """

    def exists(self, key: str) -> bool:
        """Whether there is an object."""
        try:
            self.stat(key)
        except NotFound:
            return False
        return True

    def locate(self, key: str) -> str:
        """The object's full path or URL, for messages."""
        return f"{self.url}/{key}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"


def check_key(key: str) -> str:
    """`key` itself. Keys may come from a manifest that somebody else wrote: none may lead out of the storage."""
    parts = key.split("/")
    if not key or key.startswith("/") or "\0" in key or any(part in ("", ".", "..") for part in parts):
        raise StorageError(f"{key!r} is not a key: keys are relative paths without '.', '..' or empty parts")
    return key


class local_errors:
    """Turns an OSError into an error that says what was tried, where, and what to do."""

    def __init__(self, action: str, path: Path) -> None:
        self.action, self.path = action, path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, OSError):
            return
        if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError) and self.action != "write":
            raise NotFound(f"{self.path} does not exist") from error
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(
                f"the disk is full: cannot write {self.path}. Free some space and run this again"
            ) from error
        raise StorageError(f"cannot {self.action} {self.path}: {error.strerror or error}") from error


def temporary_path(path: Path) -> Path:
    """A name beside `path` that nothing has and that is never listed."""
    return path.with_name(f".{path.name[:200]}.{secrets.token_hex(8)}.tmp")
