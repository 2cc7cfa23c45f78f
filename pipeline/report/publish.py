"""Where pages are written: over an earlier page of the same kind, and over nothing else.

A page is known by how every page of latentmill begins and by its mark, words near its beginning or its end that the
pages of one kind share. So a report is written anew as often as wanted, and replaces no file of anybody else.
"""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.errors import DestinationExists, NotFound, StorageError
from pipeline.report.elements import BEGINNING
from pipeline.storage.local import LocalStorage
from pipeline.storage.urls import open_storage, split_url

MARK_BYTES = 16 * 1024
"""Length of the beginning and of the end of a page, one of which holds its mark."""


def require_page(url: str, mark: str) -> None:
    """Raise DestinationExists where a path or URL holds anything but a page with this mark, or is a folder, and
    StorageError where that cannot be told. Verbs call it before they work."""
    root, key = split_url(url)
    storage = open_storage(root)
    path = storage.local_path(key)
    if path is not None and os.path.isdir(path):
        raise DestinationExists(f"{url} is a folder: name a file in it, as in {url}/report.html")
    if path is not None and os.path.exists(path) and not os.path.isfile(path):
        raise DestinationExists(f"{url} is a device or a pipe, and a page is a file: choose another place")
    try:
        size = storage.stat(key).size
        first = storage.get_range(key, 0, min(size, MARK_BYTES))
        last = storage.get_range(key, max(size - MARK_BYTES, 0), min(size, MARK_BYTES))
    except NotFound:
        return
    except StorageError as error:
        raise StorageError(f"{url} cannot be written over, since it cannot be read: {error}") from error
    if not first.startswith(BEGINNING) or not (mark.encode() in first or mark.encode() in last):
        raise DestinationExists(
            f"{url} exists and is no page that this verb wrote: choose another place, or move it away"
        )


def put_page(url: str, html: str, mark: str) -> None:
    """Write a page to a path or URL, whole or not at all. Raises what require_page raises, and StorageError."""
    data = html.encode()
    ends = data[:MARK_BYTES] + data[-MARK_BYTES:]
    assert data.startswith(BEGINNING) and mark.encode() in ends, "a page bears its mark"
    require_page(url, mark)
    root, key = split_url(url)
    storage = open_storage(root)
    path = storage.local_path(key)
    if path is not None and path.is_symlink():  # its target is written, and the link stays
        path = Path(os.path.realpath(path))
        storage, key = LocalStorage(path.parent), path.name
    storage.put(key, data)
