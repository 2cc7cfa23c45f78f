"""A cache of blocks on a local disk, with a bound on its bytes, shared by the ranks of a machine.

Files are written whole and then renamed. Their content is not trusted: every reader compares hashes, so after a crash
the worst case is a file that is fetched again. There are no locks: two ranks that fetch one block write equal bytes.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
import threading
from contextlib import suppress
from io import FileIO
from pathlib import Path

from pipeline.errors import StorageError

NAME = re.compile(r"(?:\.?[0-9a-f]{24}-[0-9]+-[0-9]+)(?:\.[0-9a-f]{8})?")
"""Names of blocks (reader.py), and of what is being written. Nothing else in the folder is ever removed."""
FULL = 0.9  # fraction of the bound that stays after making room


class DiskCache:
    """Blocks by name in `folder`; the least recently used ones are removed when `most_bytes` are exceeded. Files of
    other names are left alone."""

    def __init__(self, folder: Path | str, most_bytes: int) -> None:
        """Raises StorageError when the folder cannot be made."""
        self._folder, self._max_bytes = Path(folder).expanduser(), most_bytes
        self._lock = threading.Lock()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"data.cache={folder} cannot be made: {error.strerror}") from None
        self._bytes = self._make_room()

    def read_into(self, name: str, view: memoryview) -> bool:
        """Fill `view` with the content kept under a name, unverified; False if nothing of that length can be read."""
        path = self._folder / name
        with suppress(OSError), FileIO(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return False
            done = 0
            while done < len(view) and (count := file.readinto(view[done:])):
                done += count
            os.utime(path)
            return done == len(view) and not file.read(1)
        return False

    def put(self, name: str, data: bytes | memoryview) -> None:
        """Keep the data under a name, if the disk has room. Raises StorageError when the disk fails otherwise."""
        temporary = self._folder / f".{name}.{secrets.token_hex(4)}"
        try:
            temporary.write_bytes(data)
            temporary.replace(self._folder / name)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink()
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                return  # the cache works without this block
            raise StorageError(f"data.cache={self._folder} cannot be written: {error.strerror}") from error
        with self._lock:
            self._bytes += len(data)
            if self._bytes > self._max_bytes:
                self._bytes = self._make_room()

    def _make_room(self) -> int:
        """If the bound is exceeded, remove the least recently used files of all ranks until FULL of it is left. Returns
        the bytes that remain."""
        files = []
        for entry in os.scandir(self._folder):
            if not NAME.fullmatch(entry.name) or not entry.is_file(follow_symlinks=False):
                continue  # it is not ours
            with suppress(OSError):  # removed by another rank meanwhile
                status = entry.stat()
                files.append((status.st_mtime_ns, status.st_size, entry.path))
        total = sum(size for _, size, _ in files)
        if total <= self._max_bytes:
            return total
        for _, size, path in sorted(files):
            if total <= FULL * self._max_bytes:
                break
            with suppress(OSError):
                os.unlink(path)
            total -= size
        return total
