"""Objects by URL, on a local disk or on S3, behind one small interface.

A `Storage` is a root (a folder, or s3://bucket/prefix) and keys are relative posix paths under it. An object is there
whole or not at all: a local write goes to a temporary file beside its destination, is synced and then renamed, and S3
makes an object visible when its upload is complete. Nothing here trusts a store to keep bytes: readers compare hashes.
Two writers that race may both win on some stores, so what is written under one key must not depend on the writer.

pipeline/s3.py talks to S3; pipeline/patterns.py finds the objects that a user's pattern names.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from pipeline.errors import ConfigError, NotFound, StorageError

TEMPORARY = re.compile(r"\.[^/]+\.[0-9a-f]{16}\.tmp")
"""Names of files that are being written; never listed."""
COPY_BYTES = 16 * 1024 * 1024
"""A file that is copied between disks is held in pieces of this size."""


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


# --------------------------------------------------------------------------------------------------------------------
# Local folders


class LocalStorage(Storage):
    """A folder. It need not exist before something is written."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).expanduser()
        self.url = str(self.root)

    def local_path(self, key: str) -> Path:
        return self.root / check_key(key)

    def child(self, prefix: str) -> LocalStorage:
        return LocalStorage(self.local_path(prefix.rstrip("/")))

    def get(self, key: str) -> bytes:
        path = self.local_path(key)
        with local_errors("read", path):
            return path.read_bytes()

    def read_into(self, key: str, offset: int, view: memoryview) -> None:
        path, done = self.local_path(key), 0
        with local_errors("read", path), path.open("rb", buffering=0) as file:
            while done < len(view) and (got := os.preadv(file.fileno(), [view[done:]], offset + done)):
                done += got
        if done != len(view):
            raise StorageError(f"{path} ends at byte {offset + done}; {offset + len(view)} were expected")

    def put(self, key: str, data: bytes) -> None:
        path = self.local_path(key)
        with local_errors("write", path):
            _rename(_write_temporary(path, lambda file: file.write(data)), path)

    def put_file(self, key: str, path: Path) -> None:
        destination = self.local_path(key)
        with local_errors("read", path), path.open("rb") as file:
            with local_errors("write", path):
                os.fsync(file.fileno())
            with local_errors("write", destination):
                destination.parent.mkdir(parents=True, exist_ok=True)
                try:
                    path.replace(destination)
                except OSError as error:
                    if error.errno != errno.EXDEV:
                        raise
                    copy = partial(shutil.copyfileobj, file, length=COPY_BYTES)
                    _rename(_write_temporary(destination, copy), destination)
                    path.unlink()
                else:
                    _sync_folder(destination.parent)

    def staging_path(self) -> Path:
        with local_errors("write", self.root):
            self.root.mkdir(parents=True, exist_ok=True)
        return temporary_path(self.root / "staging")

    def sweep(self, seconds: float) -> None:
        for parent, _, names in os.walk(self.root):
            for path in (Path(parent, name) for name in names if TEMPORARY.fullmatch(name)):
                with suppress(OSError):  # published or removed by its owner since
                    if time.time() - path.stat().st_mtime >= seconds:
                        path.unlink()

    def put_if_absent(self, key: str, data: bytes) -> bool:
        path = self.local_path(key)
        if path.exists():
            return False
        with local_errors("write", path):
            temporary = _write_temporary(path, lambda file: file.write(data))
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
            finally:
                temporary.unlink(missing_ok=True)
            _sync_folder(path.parent)
        return True

    def stat(self, key: str) -> ObjectInfo:
        path = self.local_path(key)
        with local_errors("read", path):
            found = path.stat()
        if not path.is_file():
            raise NotFound(f"{path} is a folder")
        return _local_info(key, found)

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        folder = prefix.rpartition("/")[0]
        top = self.local_path(folder) if folder else self.root
        found = []
        for parent, folders, names in os.walk(top, onerror=_raise_unless_absent):
            folders.sort()
            for name in names:
                path = Path(parent, name)
                key = path.relative_to(self.root).as_posix()
                if not key.startswith(prefix) or TEMPORARY.fullmatch(name):
                    continue
                try:
                    found.append(_local_info(key, path.stat()))
                except FileNotFoundError:
                    continue  # removed since the folder was read
        return sorted(found, key=lambda info: info.key)

    def delete(self, key: str) -> None:
        path = self.local_path(key)
        with local_errors("delete", path):
            path.unlink(missing_ok=True)


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


def _write_temporary(path: Path, fill: Callable[[BinaryIO], object]) -> Path:
    """What `fill` writes, in a synced temporary file beside `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    try:
        with temporary.open("xb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def _rename(temporary: Path, path: Path) -> None:
    """Give a synced temporary file its name, so that it survives a power cut."""
    try:
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _local_info(key: str, found: os.stat_result) -> ObjectInfo:
    return ObjectInfo(key=key, size=found.st_size, etag=f"{found.st_mtime_ns:x}-{found.st_size:x}")


def _raise_unless_absent(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise StorageError(f"cannot list {error.filename}: {error.strerror}") from error


# --------------------------------------------------------------------------------------------------------------------
# URLs


def open_storage(url: str) -> Storage:
    """The storage rooted at a folder or at s3://bucket/prefix. Raises ConfigError for anything else."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        if not url:
            raise ConfigError("an empty path: give a folder or s3://bucket/prefix")
        return LocalStorage(url)
    if scheme != "s3":
        raise ConfigError(f"{url}: {scheme}:// is not supported; give a local path or s3://bucket/prefix")
    bucket, _, prefix = rest.partition("/")
    if not bucket:
        raise ConfigError(f"{url}: no bucket; write s3://bucket/prefix")
    from pipeline.s3 import S3Storage

    return S3Storage(bucket, prefix)


def split_url(url: str) -> tuple[str, str]:
    """(root, key) of one object: "s3://b/a/x.tar" -> ("s3://b/a", "x.tar"); "b.tar" -> (".", "b.tar")."""
    root, _, key = url.rpartition("/")
    if not key or (root.endswith("/") and "://" in url and root.count("/") < 3):
        raise ConfigError(f"{url!r} names no object")
    if not root:
        return ("/" if url.startswith("/") else "."), key
    return root, key
