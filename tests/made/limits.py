"""What a full disk does to a writer, and what a umask should do to its files."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """No file of this process grows over `size` bytes: a write beyond fails in the system, as on a full disk (EFBIG in
    place of ENOSPC), whatever library makes it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def modes(top: Path) -> dict[str, int]:
    """Path below `top` (a folder, or a file itself as "") -> permission bits."""
    if top.is_file():
        return {"": top.stat().st_mode & 0o777}
    return {path.relative_to(top).as_posix(): path.stat().st_mode & 0o777 for path in top.rglob("*")}


def wrong_modes(top: Path, mask: int) -> dict[str, int]:
    """What has other bits than a new file (666) or folder (777) has under this umask."""
    return {
        name: mode for name, mode in modes(top).items() if mode != (0o777 if (top / name).is_dir() else 0o666) & ~mask
    }
