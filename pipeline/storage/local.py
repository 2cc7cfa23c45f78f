"""Objects in a folder on a local disk.

A `Storage` is a root (a folder, or a prefix in a bucket), and keys are relative posix paths under it. An object exists
completely or not at all: a local write goes to a temporary file beside its destination, which is synced and then
renamed, and S3 makes an object visible when its upload is complete. A store is not trusted to keep bytes: readers
compare hashes. When two writers race, both may succeed on some stores, so what is written under a key must not depend
on the writer.

pipeline/storage/s3.py is the same for S3; pipeline/storage/patterns.py finds the objects that a user's pattern names.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from io import FileIO
from pathlib import Path
from typing import BinaryIO

from pipeline.errors import NotFound, StorageError
from pipeline.storage.base import TEMPORARY, ObjectInfo, Storage, check_key, local_errors, temporary_path

COPY_BYTES = 16 * 1024 * 1024
"""A file is copied between disks in pieces of this size."""


class LocalStorage(Storage):
    """A folder, which need not exist before something is written."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).expanduser()
        self.url = str(self.root)

    def local_path(self, key: str) -> Path:
        return self.root / check_key(key)

    def child(self, prefix: str) -> LocalStorage:
        return LocalStorage(self.local_path(prefix.rstrip("/")))

    def get(self, key: str) -> bytes:
        with self._opened(key) as file:
            return file.readall()

    def read_into(self, key: str, offset: int, view: memoryview) -> None:
        path, done = self.local_path(key), 0
        with self._opened(key) as file:
            while done < len(view) and (count := os.preadv(file.fileno(), [view[done:]], offset + done)):
                done += count
        if done != len(view):
            raise StorageError(f"{path} ends at byte {offset + done}; {offset + len(view)} were expected")

    @contextmanager
    def _opened(self, key: str) -> Iterator[FileIO]:
        """The object as an open file. Raises NotFound, and StorageError for a pipe, a socket or a device, which has no
        end or no beginning."""
        path = self.local_path(key)
        with local_errors("read", path), FileIO(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)) as file:
            mode = os.fstat(file.fileno()).st_mode
            if stat.S_ISDIR(mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
            if not stat.S_ISREG(mode):
                raise StorageError(f"{path} is a pipe, a socket or a device, and not a file")
            yield file

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
                with suppress(OSError):  # its owner may have published or removed it
                    if time.time() - path.stat().st_mtime >= seconds:
                        path.unlink()

    def put_if_absent(self, key: str, data: bytes) -> bool:
        path = self.local_path(key)
        if _is_taken(path):
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
            status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise NotFound(f"{path} is a folder, a pipe or a device")
        return _local_info(key, status)

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        folder = prefix.rpartition("/")[0]
        top = self.local_path(folder) if folder else self.root
        infos = []
        for parent, folders, names in os.walk(top, onerror=_raise_unless_absent):
            folders.sort()
            for name in names:
                path = Path(parent, name)
                key = path.relative_to(self.root).as_posix()
                if not key.startswith(prefix) or TEMPORARY.fullmatch(name):
                    continue
                try:
                    status = path.stat()
                except FileNotFoundError:
                    continue  # a link to nothing, or it was removed after the folder was read
                except OSError as error:
                    raise StorageError(f"cannot read {path}: {error.strerror}") from error
                if stat.S_ISREG(status.st_mode) and _is_text(key):
                    infos.append(_local_info(key, status))
        return sorted(infos, key=lambda info: info.key)

    def delete(self, key: str) -> None:
        path = self.local_path(key)
        with local_errors("delete", path):
            path.unlink(missing_ok=True)


def _is_taken(path: Path) -> bool:
    """Whether a file is there. Its owner may remove it at any moment, so that two looks may differ: what the first one
    has seen counts. Raises StorageError for what is no file."""
    try:
        status = os.lstat(path)
    except OSError:
        return False  # a write says why
    if stat.S_ISLNK(status.st_mode):
        with suppress(OSError):  # a link to nothing
            status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise StorageError(f"{path} is a folder, a pipe, a device or a link to nothing, where a file is to be")
    return True


def _write_temporary(path: Path, fill: Callable[[BinaryIO], object]) -> Path:
    """A synced temporary file beside `path` with what `fill` writes."""
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
    """Give a synced temporary file its final name, so that it survives a power cut."""
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


def _local_info(key: str, status: os.stat_result) -> ObjectInfo:
    return ObjectInfo(key=key, size=status.st_size, etag=f"{status.st_mtime_ns:x}-{status.st_size:x}")


def _is_text(key: str) -> bool:
    """Whether a key can be stored as UTF-8; a file name that is not is nobody's object."""
    try:
        key.encode()
    except UnicodeEncodeError:
        return False
    return True


def _raise_unless_absent(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise StorageError(f"cannot list {error.filename}: {error.strerror}") from error
