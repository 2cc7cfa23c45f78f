"""The interface of a store, and what its implementations share: keys, errors, temporary names."""

from __future__ import annotations

import errno
import re
import secrets
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import NotFound, StorageError

TEMPORARY = re.compile(r"\.[^/]+\.[0-9a-f]{16}\.tmp")
"""Names of files that are still being written, and of what a store is asked with; `list` never returns them."""


@dataclass(frozen=True)
class ObjectInfo:
    """What a store knows about an object without reading it."""

    key: str
    """Relative to the storage that returned it."""
    size: int
    """Bytes."""
    etag: str
    """Changes when the object does; comparable only within one store."""


class Storage(ABC):
    """A root with objects under it. All methods may be called from several threads at once."""

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
        """Fill `view` with the bytes from `offset` on. Raises what `get_range` raises."""

    @abstractmethod
    def put(self, key: str, data: bytes) -> None:
        """Write the object completely or not at all, and replace one that exists. Raises StorageError."""

    @abstractmethod
    def put_file(self, key: str, path: Path) -> None:
        """Make a finished local file the object, completely or not at all, and replace one that exists. The file may be
        larger than memory. On success it is removed from `path`; on failure it stays there. Raises NotFound where there
        is no such file, StorageError."""

    @abstractmethod
    def staging_path(self) -> Path:
        """Path at which to write a file for `put_file`: a new name at every call, at which nothing exists yet, which is
        never listed, and which is on the storage's own file system if it has one (publishing is then a rename). On S3
        it is in the system's temporary folder (TMPDIR). The caller removes what it does not publish. Raises
        StorageError."""

    @abstractmethod
    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write the object unless it exists. False: it exists already. A request that was retried may have written it
        itself, so compare the bytes before you conclude that another writer did."""

    @abstractmethod
    def stat(self, key: str) -> ObjectInfo:
        """Size and etag of the object. Raises NotFound."""

    @abstractmethod
    def list(self, prefix: str = "") -> list[ObjectInfo]:
        """Every object whose key starts with `prefix` (a string, not a folder), at any depth, sorted by key. Left out
        is what is no object: temporary files, links to nothing, pipes, and the empty objects that stand for folders on
        some stores (their keys end in a slash)."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove the object; no error where it does not exist."""

    @abstractmethod
    def local_path(self, key: str) -> Path | None:
        """Path of the object on this machine's disk; None where the store is not a local disk."""

    @abstractmethod
    def child(self, prefix: str) -> Storage:
        """The storage whose root is `prefix` under this one."""

    @abstractmethod
    def sweep(self, seconds: float) -> None:
        """Remove incomplete files of killed writers: those to which nothing was written for `seconds`.

        Does nothing where writers leave none (on S3 a bucket's lifecycle rule removes interrupted uploads).
        """

    def exists(self, key: str) -> bool:
        """Whether the object exists."""
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
    """The key itself, if it is valid: a key from somebody else's manifest must not lead out of the storage. Raises
    StorageError."""
    parts = key.split("/")
    if not key or key.startswith("/") or "\0" in key or any(part in ("", ".", "..") for part in parts):
        raise StorageError(f"{key!r} is not a key: keys are relative paths without '.', '..' or empty parts")
    try:
        key.encode()
    except UnicodeEncodeError:
        raise StorageError(f"{key!r} is not a key: it is no Unicode text") from None
    return key


class local_errors:
    """Turns an OSError into NotFound or a StorageError that says what was attempted, where, and what to do."""

    def __init__(self, action: str, path: Path) -> None:
        self.action, self.path = action, path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, OSError):
            return
        if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError) and self.action != "write":
            raise NotFound(f"{self.path} does not exist") from error
        if error.errno == errno.EROFS:
            raise StorageError(f"cannot {self.action} {self.path}: its disk is mounted read-only") from error
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(
                f"the disk is full: cannot write {self.path}. Free some space and run this again"
            ) from error
        raise StorageError(f"cannot {self.action} {self.path}: {error.strerror or error}") from error


def temporary_path(path: Path) -> Path:
    """A new name in the folder of `path` that no file has and that is never listed."""
    return path.with_name(f".{path.name[:200]}.{secrets.token_hex(8)}.tmp")
