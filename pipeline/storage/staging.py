"""Files that other libraries write, on their way into a store: a folder of their own, modes, and errors in one line.

A file that is to be published is first written whole into a staging folder: inside of its destination on a local disk,
so that publishing is a rename there whether the destination is a mount point, a link to a folder or ".", and in TMPDIR
for a bucket.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.errors import DestinationExists, StorageError
from pipeline.storage.base import Storage, local_errors, temporary_path
from pipeline.storage.local import LocalStorage

STAGING = re.compile(r"\.latentmill-[0-9a-f]{16}")
"""Names of staging folders."""
SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")
"""How libraries in Rust report what the system said."""
FAILED_WRITE = ("file write failed", "unexpected pos")
"""How PyTorch reports a write that the system refused, without the reason."""


@contextmanager
def staging_folder(storage: Storage) -> Iterator[Path]:
    """A new empty folder for files that `storage` will take, removed at the end with what is left in it; so are those
    of writers that were killed, and the destination itself where it is new and nothing was published.

    Raises StorageError where it cannot be made.
    """
    if not isinstance(storage, LocalStorage):
        with local_errors("write", Path(tempfile.gettempdir())):
            temporary = tempfile.TemporaryDirectory(prefix="latentmill-", ignore_cleanup_errors=True)
        with temporary as name:
            yield Path(name)
        return
    root = storage.root
    new = [folder for folder in (root, *root.parents) if not folder.exists()]
    folder = root / f".latentmill-{secrets.token_hex(8)}"
    try:
        with local_errors("write", root):
            root.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(root)
            folder.mkdir()
        with _held(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):
            for parent in new:
                parent.rmdir()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A context for a library that writes to `path`: its errors of many kinds become a StorageError that names the
    file, where the system refused a write."""
    try:
        with local_errors("write", path):
            yield
    except StorageError:
        raise
    except Exception as error:  # safetensors, tokenizers and PyTorch have classes of their own
        refused = _system_error(error, path)
        if refused is None:
            raise
        with local_errors("write", path):
            raise refused from error


def obey_umask(path: Path) -> None:
    """Give a file, or every file below a folder, the mode that a new file has here: some libraries make theirs
    readable by their owner alone."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    if not files:
        return
    probe = temporary_path((path if path.is_dir() else path.parent) / "mode")
    with local_errors("write", probe):
        descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            mode = os.fstat(descriptor).st_mode & 0o777
        finally:
            os.close(descriptor)
            probe.unlink()
    for file in files:
        with suppress(PermissionError):  # a file system without modes
            file.chmod(mode)


def require_folder(storage: Storage) -> None:
    """Raise DestinationExists where a local destination is something else than a folder, or a place for one."""
    if not isinstance(storage, LocalStorage):
        return
    for place in (storage.root, *storage.root.parents):
        if place.is_dir():
            return
        if place.exists():
            raise DestinationExists(f"{place} is a file, and a folder is wanted there: choose another dest")
        if place.is_symlink():
            raise DestinationExists(f"{place} is a link to a place that does not exist: choose another dest")


def is_empty(storage: Storage) -> bool:
    """Whether nothing lies in the destination; staging folders do not count."""
    if not isinstance(storage, LocalStorage):
        return not storage.list()
    with local_errors("list", storage.root):
        if not storage.root.is_dir():
            return True
        with os.scandir(storage.root) as entries:
            return all(STAGING.fullmatch(entry.name) for entry in entries)


def require_place(storage: Storage, key: str) -> None:
    """Raise DestinationExists where a local file cannot lie at `key`: a folder is there, or a file in place of one of
    the folders above it."""
    path = storage.local_path(key)
    if path is None:
        return
    if path.is_dir():
        raise DestinationExists(f"{path} is a folder, and a file is to be written there: choose another dest")
    require_folder(LocalStorage(path.parent))


def require_writable(storage: Storage) -> None:
    """Raise StorageError where no file can be made in a local destination, or in what will hold its folder."""
    if isinstance(storage, LocalStorage):
        there = next(folder for folder in (storage.root, *storage.root.absolute().parents) if folder.is_dir())
        probe = temporary_path(there / "probe")
        with local_errors("write", storage.root):
            probe.touch(exist_ok=False)
            probe.unlink()


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """A lock on a staging folder, by which others see that its writer lives."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _remove_leftovers(root: Path) -> None:
    """Remove the staging folders of writers that were killed."""
    for folder in root.iterdir():
        if not STAGING.fullmatch(folder.name) or folder.is_symlink() or not folder.is_dir():
            continue
        with suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(descriptor)


def _system_error(error: BaseException, path: Path) -> OSError | None:
    """The system's error behind a library's own; None where there is none."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError):
            return link
        if found := SYSTEM_ERROR.search(str(link)):
            number = int(found[1])
            return OSError(number, os.strerror(number))
        link = link.__cause__ or link.__context__
    if any(words in str(error) for words in FAILED_WRITE):
        full = shutil.disk_usage(path.parent).free < 2**20
        return OSError(errno.ENOSPC if full else errno.EIO, os.strerror(errno.ENOSPC if full else errno.EIO))
    return None
